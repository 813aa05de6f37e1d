// What Native.kt declares, by llama.cpp. A handle is the address of a Model; what llama.cpp refuses becomes an IllegalStateException.

#include <jni.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "llama.h"

namespace {

constexpr int BATCH = 256;  // tokens of one pass

struct Model {
    llama_model *model;
    llama_context *context;
    const llama_vocab *vocabulary;
};

Model *at(jlong handle) {
    return reinterpret_cast<Model *>(handle);
}

void raise(JNIEnv *env, const char *message) {
    if (jclass kind = env->FindClass("java/lang/IllegalStateException")) {
        env->ThrowNew(kind, message);
    }
}

std::string read(JNIEnv *env, jbyteArray data) {
    std::string found(env->GetArrayLength(data), '\0');
    env->GetByteArrayRegion(data, 0, static_cast<jsize>(found.size()), reinterpret_cast<jbyte *>(found.data()));
    return found;
}

std::vector<llama_token> read(JNIEnv *env, jintArray data) {
    std::vector<llama_token> found(env->GetArrayLength(data));
    env->GetIntArrayRegion(data, 0, static_cast<jsize>(found.size()), found.data());
    return found;
}

jlong model_open(JNIEnv *env, jobject, jbyteArray path, jint room, jint threads) {
    static const bool ready = (llama_backend_init(), true);
    static_cast<void>(ready);
    llama_model_params options = llama_model_default_params();
    options.n_gpu_layers = 0;
    llama_model *model = llama_model_load_from_file(read(env, path).c_str(), options);
    if (model == nullptr) {
        raise(env, "llama.cpp does not load the model's file");
        return 0;
    }
    llama_context_params wanted = llama_context_default_params();
    wanted.n_ctx = room;
    wanted.n_batch = wanted.n_ubatch = BATCH;
    wanted.n_threads = wanted.n_threads_batch =
        threads > 0 ? threads : std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / 2);
    llama_context *context = llama_init_from_model(model, wanted);
    if (context == nullptr) {
        llama_model_free(model);
        raise(env, "llama.cpp makes no context of this size");
        return 0;
    }
    return reinterpret_cast<jlong>(new Model{model, context, llama_model_get_vocab(model)});
}

void model_close(JNIEnv *, jobject, jlong handle) {
    llama_free(at(handle)->context);
    llama_model_free(at(handle)->model);
    delete at(handle);
}

void model_clear(JNIEnv *, jobject, jlong handle) {
    llama_memory_clear(llama_get_memory(at(handle)->context), true);
}

// The logits of the token after these, which follow what the context holds already.
jfloatArray model_evaluate(JNIEnv *env, jobject, jlong handle, jintArray given) {
    std::vector<llama_token> tokens = read(env, given);
    if (tokens.empty()) {
        raise(env, "there are no tokens to evaluate");
        return nullptr;
    }
    for (size_t start = 0; start < tokens.size(); start += BATCH) {
        const int count = static_cast<int>(std::min<size_t>(BATCH, tokens.size() - start));
        const int status = llama_decode(at(handle)->context, llama_batch_get_one(tokens.data() + start, count));
        if (status != 0) {
            raise(env, status == 1 ? "the context is full: clear it, or load the model with a larger one" : "llama.cpp cannot evaluate these tokens");
            return nullptr;
        }
    }
    const int size = llama_vocab_n_tokens(at(handle)->vocabulary);
    jfloatArray found = env->NewFloatArray(size);
    if (found != nullptr) {
        env->SetFloatArrayRegion(found, 0, size, llama_get_logits_ith(at(handle)->context, -1));
    }
    return found;
}

jintArray model_tokens(JNIEnv *env, jobject, jlong handle, jbyteArray given) {
    const std::string text = read(env, given);
    std::vector<llama_token> tokens(text.size() + 16);
    const int length = static_cast<int>(text.size());
    int count = llama_tokenize(at(handle)->vocabulary, text.data(), length, tokens.data(), static_cast<int>(tokens.size()), true, true);
    if (count < 0) {
        tokens.resize(-count);
        count = llama_tokenize(at(handle)->vocabulary, text.data(), length, tokens.data(), -count, true, true);
    }
    jintArray found = env->NewIntArray(std::max(count, 0));
    if (found != nullptr && count > 0) {
        env->SetIntArrayRegion(found, 0, count, tokens.data());
    }
    return found;
}

jbyteArray model_text(JNIEnv *env, jobject, jlong handle, jintArray given) {
    const std::vector<llama_token> tokens = read(env, given);
    std::string text(tokens.size() * 16 + 16, '\0');
    const int number = static_cast<int>(tokens.size());
    int count = llama_detokenize(at(handle)->vocabulary, tokens.data(), number, text.data(), static_cast<int>(text.size()), false, false);
    if (count < 0) {
        text.resize(-count);
        count = llama_detokenize(at(handle)->vocabulary, tokens.data(), number, text.data(), -count, false, false);
    }
    jbyteArray found = env->NewByteArray(std::max(count, 0));
    if (found != nullptr && count > 0) {
        env->SetByteArrayRegion(found, 0, count, reinterpret_cast<const jbyte *>(text.data()));
    }
    return found;
}

jboolean model_ends(JNIEnv *, jobject, jlong handle, jint token) {
    return llama_vocab_is_eog(at(handle)->vocabulary, token) ? JNI_TRUE : JNI_FALSE;
}

const JNINativeMethod METHODS[] = {
    {const_cast<char *>("open"), const_cast<char *>("([BII)J"), reinterpret_cast<void *>(model_open)},
    {const_cast<char *>("close"), const_cast<char *>("(J)V"), reinterpret_cast<void *>(model_close)},
    {const_cast<char *>("clear"), const_cast<char *>("(J)V"), reinterpret_cast<void *>(model_clear)},
    {const_cast<char *>("evaluate"), const_cast<char *>("(J[I)[F"), reinterpret_cast<void *>(model_evaluate)},
    {const_cast<char *>("tokens"), const_cast<char *>("(J[B)[I"), reinterpret_cast<void *>(model_tokens)},
    {const_cast<char *>("text"), const_cast<char *>("(J[I)[B"), reinterpret_cast<void *>(model_text)},
    {const_cast<char *>("ends"), const_cast<char *>("(JI)Z"), reinterpret_cast<void *>(model_ends)},
};

}  // namespace

extern "C" JNIEXPORT jint JNICALL JNI_OnLoad(JavaVM *machine, void *) {
    JNIEnv *env = nullptr;
    if (machine->GetEnv(reinterpret_cast<void **>(&env), JNI_VERSION_1_6) != JNI_OK) {
        return JNI_ERR;
    }
    jclass declared = env->FindClass("edgebuild/smallandroidmodel/Native");
    if (declared == nullptr || env->RegisterNatives(declared, METHODS, static_cast<jint>(std::size(METHODS))) != JNI_OK) {
        return JNI_ERR;
    }
    return JNI_VERSION_1_6;
}
