package ai.onnxruntime;

public class TensorInfo {
    final long[] shape = {};
    public final OnnxJavaType type = OnnxJavaType.UNKNOWN;

    public long[] getShape() {
        return shape;
    }
}
