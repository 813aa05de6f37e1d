package ai.onnxruntime;

import java.util.Map;
import java.util.Optional;

public class OrtSession implements AutoCloseable {
    public Result run(Map<String, ? extends OnnxTensorLike> inputs) throws OrtException {
        throw new UnsupportedOperationException();
    }

    @Override
    public void close() throws OrtException {}

    public static class SessionOptions implements AutoCloseable {
        public void setIntraOpNumThreads(int number) throws OrtException {}

        @Override
        public void close() {}
    }

    public static class Result implements AutoCloseable {
        public Optional<OnnxValue> get(String name) {
            throw new UnsupportedOperationException();
        }

        public OnnxValue get(int index) {
            throw new UnsupportedOperationException();
        }

        @Override
        public void close() {}
    }
}
