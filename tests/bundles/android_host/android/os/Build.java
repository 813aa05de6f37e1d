package android.os;

public class Build {
    public static final String MANUFACTURER = "none";
    public static final String MODEL = "Java";

    public static class VERSION {
        public static final String RELEASE = "none";
    }
}
