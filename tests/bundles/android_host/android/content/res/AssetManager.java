package android.content.res;

import java.io.File;
import java.io.FileNotFoundException;
import java.io.IOException;
import java.io.InputStream;
import java.util.zip.ZipEntry;
import java.util.zip.ZipFile;

/** The assets of a package. */
public class AssetManager {
    private final File apk;

    public AssetManager(File apk) {
        this.apk = apk;
    }

    public InputStream open(String name) throws IOException {
        ZipFile archive = new ZipFile(apk);
        ZipEntry entry = archive.getEntry("assets/" + name);
        if (entry == null) {
            throw new FileNotFoundException(name);
        }
        return archive.getInputStream(entry);
    }

    public AssetFileDescriptor openFd(String name) throws IOException {
        throw new FileNotFoundException(name);
    }
}
