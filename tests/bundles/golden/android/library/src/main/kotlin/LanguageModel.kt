package edgebuild.smallandroidmodel

/** A language model in memory, run by llama.cpp on the processor. One thread at a time may use it; close it afterwards. */
class LanguageModel internal constructor(path: String, contextSize: Int, threads: Int) : AutoCloseable {
    private var handle = Native.open(path.toByteArray(), contextSize, threads)

    /** Forgets what was said. */
    fun clear() = Native.clear(live())

    /** Adds tokens to what was said; the logits of the token after them. */
    fun evaluate(tokens: IntArray): FloatArray = Native.evaluate(live(), tokens)

    fun tokens(text: String): IntArray = Native.tokens(live(), text.toByteArray())

    fun text(tokens: IntArray): String = String(Native.text(live(), tokens), Charsets.UTF_8)

    /**
     * Forgets what was said and continues [prompt] by the likeliest tokens, [limit] of them at most.
     *
     * [heard] gets all of the continuation so far and ends it with false.
     */
    fun generate(prompt: String, limit: Int = 128, heard: (String) -> Boolean = { true }): String {
        clear()
        val said = mutableListOf<Int>()
        var text = ""
        var logits = evaluate(tokens(prompt))
        while (said.size < limit) {
            val next = logits.likeliest()
            if (Native.ends(live(), next)) break
            said += next
            text = text(said.toIntArray())
            if (!heard(text) || said.size == limit) break
            logits = evaluate(intArrayOf(next))
        }
        return text
    }

    override fun close() {
        if (handle != 0L) Native.close(handle)
        handle = 0L
    }

    private fun live(): Long = handle.also { check(it != 0L) { "the model is closed" } }
}

internal fun FloatArray.likeliest(): Int {
    var best = 0
    for (index in indices) if (this[index] > this[best]) best = index
    return best
}
