package com.google.android.play.core.assetpacks;

import android.content.Context;

public class AssetPackManagerFactory {
    public static AssetPackManager getInstance(Context context) {
        throw new UnsupportedOperationException();
    }
}
