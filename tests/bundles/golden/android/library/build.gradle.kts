plugins {
    id("com.android.library")
    id("org.jetbrains.kotlin.android") // from Android Gradle plugin 9 on, which compiles Kotlin by itself, delete this line
}

android {
    namespace = "edgebuild.smallandroidmodel"
    compileSdk = 35

    defaultConfig {
        minSdk = 26
        ndk {
            abiFilters += "arm64-v8a"
        }
        externalNativeBuild {
            cmake {
                // Devices with pages of 16 KiB load no library that is aligned to less.
                arguments += listOf("-DCMAKE_BUILD_TYPE=Release", "-DANDROID_SUPPORT_FLEXIBLE_PAGE_SIZES=ON")
            }
        }
    }

    externalNativeBuild {
        cmake {
            path = file("src/main/cpp/CMakeLists.txt")
        }
    }
}

kotlin {
    jvmToolchain(17)
}
