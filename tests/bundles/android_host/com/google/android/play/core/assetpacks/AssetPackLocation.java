package com.google.android.play.core.assetpacks;

public abstract class AssetPackLocation {
    public abstract String assetsPath();
}
