package ai.onnxruntime;

import java.nio.ByteBuffer;

/** Declarations of ONNX Runtime's own Java interface, as far as the android bundle asks for it; they do nothing. */
public class OrtEnvironment implements AutoCloseable {
    public static OrtEnvironment getEnvironment() {
        throw new UnsupportedOperationException();
    }

    public void setTelemetry(boolean send) throws OrtException {}

    public OrtSession createSession(ByteBuffer model, OrtSession.SessionOptions options) throws OrtException {
        throw new UnsupportedOperationException();
    }

    @Override
    public void close() {}
}
