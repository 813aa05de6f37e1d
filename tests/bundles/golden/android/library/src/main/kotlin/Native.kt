package edgebuild.smallandroidmodel

/** What glue.cpp does. A handle is what [open] gave, until [close] has taken it. */
internal object Native {
    init {
        System.loadLibrary("SmallAndroidModel")
    }

    /** [path] in UTF-8; [threads] 0: half of those that the device has. */
    external fun open(path: ByteArray, contextSize: Int, threads: Int): Long

    external fun close(handle: Long)

    external fun clear(handle: Long)

    external fun evaluate(handle: Long, tokens: IntArray): FloatArray

    external fun tokens(handle: Long, text: ByteArray): IntArray

    external fun text(handle: Long, tokens: IntArray): ByteArray

    external fun ends(handle: Long, token: Int): Boolean
}
