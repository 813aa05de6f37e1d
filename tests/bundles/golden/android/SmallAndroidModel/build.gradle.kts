plugins {
    id("com.android.asset-pack")
}

assetPack {
    packName = "SmallAndroidModel"
    dynamicDelivery {
        deliveryType = "install-time"
    }
}
