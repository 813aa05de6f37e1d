package com.google.android.play.core.assetpacks;

public interface AssetPackManager {
    AssetPackLocation getPackLocation(String packName);
}
