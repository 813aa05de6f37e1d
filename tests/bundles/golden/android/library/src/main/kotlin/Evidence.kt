package edgebuild.smallandroidmodel

import android.content.Context
import android.os.Build
import org.json.JSONArray
import org.json.JSONObject

internal class Measurement(val name: String, val value: Double, val unit: String, val n: Int, val passed: Boolean)

internal fun golden(context: Context): JSONObject =
    JSONObject(context.assets.open(SmallAndroidModel.PACK + "/golden.json").use { it.readBytes().decodeToString() })

/** Prints PASS or FAIL and, last, the evidence as one line of JSON: `adb logcat -s System.out` shows both. */
internal fun report(runtime: String, measurements: List<Measurement>): Boolean {
    val passed = measurements.all { it.passed }
    val verdict = if (passed) "PASS" else "FAIL"
    val evidence = JSONObject()
        .put("bundle", SmallAndroidModel.NAME)
        .put("version", SmallAndroidModel.VERSION)
        .put("verdict", verdict)
        .put("measurements", JSONArray(measurements.map { it.json(runtime) }))
    println("$verdict ${measurements.joinToString { "${it.name} ${it.value} (${it.unit})" }}")
    println(evidence)
    return passed
}

private fun Measurement.json(runtime: String): JSONObject = JSONObject()
    .put("name", name)
    .put("phase", "self-test")
    .put("value", if (value.isFinite()) value else JSONObject.NULL)
    .put("unit", unit)
    .put("n", n)
    .put("runtime", runtime)
    .put("machine", "Android ${Build.VERSION.RELEASE}, ${Build.MANUFACTURER} ${Build.MODEL}")
