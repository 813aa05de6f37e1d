// swift-tools-version: 6.2
import PackageDescription

let package = Package(
    name: "SmallIosModel",
    platforms: [.iOS("17.0"), .macOS("14.0")],
    products: [
        .library(name: "SmallIosModel", targets: ["SmallIosModel"])
    ],
    dependencies: [
        // Major versions are pinned: mlx-swift-lm 3 changed how tokenizers are found, and the next one may again.
        .package(url: "https://github.com/ml-explore/mlx-swift-lm", .upToNextMajor(from: "3.31.4")),
        .package(url: "https://github.com/ml-explore/mlx-swift", from: "0.31.4"),
        .package(url: "https://github.com/huggingface/swift-transformers", .upToNextMajor(from: "1.3.0")),
    ],
    targets: [
        .target(
            name: "SmallIosModel",
            dependencies: [
                .product(name: "MLX", package: "mlx-swift"),
                .product(name: "MLXLLM", package: "mlx-swift-lm"),
                .product(name: "MLXLMCommon", package: "mlx-swift-lm"),
                .product(name: "Tokenizers", package: "swift-transformers"),
            ],
            resources: [
                .copy("Resources/model"),
                .copy("Resources/golden.json"),
                .copy("Resources/PrivacyInfo.xcprivacy"),
            ]
        )
    ]
)
