package edgebuild.smallandroidmodel

import android.content.Context
import java.io.File
import java.io.FileOutputStream

/** The model of this module. Nothing is downloaded but by Google Play, and nothing is sent. */
object SmallAndroidModel {
    const val NAME = "small-android"
    const val VERSION = "1.2.3"
    const val SUMMARY = "A small model"
    const val PACK = "SmallAndroidModel"

    /** Reads the model into memory. Takes a while: call it once, not on the main thread, and keep what it returns. */
    fun load(context: Context, contextSize: Int = 2048, threads: Int = 0): LanguageModel =
        LanguageModel(file(context).path, contextSize, threads)

    /** Runs the golden example on this device and prints PASS or FAIL and the evidence as one line of JSON; true: PASS. */
    fun selfTest(context: Context): Boolean = load(context, contextSize = 256).use { runGolden(context, it) }

    /** llama.cpp opens files by path and maps them, and an asset has no path: it is copied out after each installation, once. */
    @Synchronized
    private fun file(context: Context): File {
        val folder = File(context.noBackupFilesDir, PACK)
        val installed = context.packageManager.getPackageInfo(context.packageName, 0).lastUpdateTime
        val file = File(folder, "$installed.gguf")
        if (file.exists()) return file
        folder.deleteRecursively()
        check(folder.mkdirs()) { "$folder cannot be made" }
        val part = File(folder, "part")
        context.assets.open("$PACK/model.gguf").use { asset ->
            FileOutputStream(part).use {
                asset.copyTo(it, 1 shl 20)
                it.fd.sync()
            }
        }
        check(part.renameTo(file)) { "$file cannot be made" }
        return file
    }
}
