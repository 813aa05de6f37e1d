package android.content;

import android.content.pm.PackageManager;
import android.content.res.AssetManager;
import java.io.File;

/** As much of Android's Context as the android bundle asks for, on a package and a folder of this machine. */
public class Context {
    private final File apk;
    private final File storage;

    public Context(File apk, File storage) {
        this.apk = apk;
        this.storage = storage;
    }

    public AssetManager getAssets() {
        return new AssetManager(apk);
    }

    public File getNoBackupFilesDir() {
        return storage;
    }

    public PackageManager getPackageManager() {
        return new PackageManager(apk);
    }

    public String getPackageName() {
        return "edgebuild.test";
    }

    public Context getApplicationContext() {
        return this;
    }
}
