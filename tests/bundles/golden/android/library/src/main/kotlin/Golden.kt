package edgebuild.smallandroidmodel

import android.content.Context
import org.json.JSONArray
import kotlin.math.abs

/** The logits after the golden prompt, and those tokens of its continuation that no near tie makes doubtful. */
internal fun runGolden(context: Context, model: LanguageModel): Boolean {
    val golden = golden(context)
    val sure = golden.getJSONArray("continuation").ints().take(golden.getInt("certain"))
    val top = golden.getJSONArray("top")
    val tolerance = golden.getJSONObject("tolerance")
    model.clear()
    var logits = model.evaluate(golden.getJSONArray("prompt").ints())
    val shares = (0 until top.length()).map { index ->
        val wanted = top.getJSONObject(index).getDouble("logit")
        val allowed = tolerance.getDouble("absolute") + tolerance.getDouble("relative") * abs(wanted)
        abs(logits[top.getJSONObject(index).getInt("token")] - wanted) / allowed
    }
    val said = mutableListOf<Int>()
    for (step in sure.indices) {
        if (step > 0) logits = model.evaluate(intArrayOf(said.last()))
        said += logits.likeliest()
    }
    return report(
        runtime = "llama.cpp 0c1e57098bba43ac29e6e3b677cdceebdd22334f",
        measurements = listOf(
            Measurement("golden_logits", shares.max(), "share of the tolerance", shares.size, passed = shares.all { it <= 1 }),
            Measurement("golden_tokens", if (said == sure) 1.0 else 0.0, "1 where all are the same", sure.size, passed = said == sure),
        ),
    )
}

private fun JSONArray.ints(): IntArray = IntArray(length()) { getInt(it) }
