import Foundation
import MLXLLM
import MLXLMCommon
import Tokenizers

/// The model in this package. It is read from the package's own resources; nothing is downloaded.
public enum SmallIosModel {
    public static let name = "small-ios"
    public static let version = "1.2.3"
    public static let summary = "A small model"

    /// The folder that holds weights, configuration and tokenizer.
    public static var folder: URL {
        get throws { try resource("model", nil) }
    }

    /// Reads the model into memory: call it once, keep what it returns.
    public static func load() async throws -> ModelContainer {
        try await LLMModelFactory.shared.loadContainer(from: folder, using: LocalTokenizer.Loader())
    }

    static func resource(_ name: String, _ suffix: String?) throws -> URL {
        guard let url = Bundle.module.url(forResource: name, withExtension: suffix) else {
            throw CocoaError(.fileNoSuchFile)
        }
        return url
    }
}

/// The tokenizer of swift-transformers behind the interface that MLXLMCommon asks for.
struct LocalTokenizer: MLXLMCommon.Tokenizer {
    struct Loader: TokenizerLoader {
        func load(from directory: URL) async throws -> any MLXLMCommon.Tokenizer {
            LocalTokenizer(inner: try await AutoTokenizer.from(modelFolder: directory))
        }
    }

    let inner: any Tokenizers.Tokenizer

    var bosToken: String? { inner.bosToken }
    var eosToken: String? { inner.eosToken }
    var unknownToken: String? { inner.unknownToken }

    func encode(text: String, addSpecialTokens: Bool) -> [Int] {
        inner.encode(text: text, addSpecialTokens: addSpecialTokens)
    }

    func decode(tokenIds: [Int], skipSpecialTokens: Bool) -> String {
        inner.decode(tokens: tokenIds, skipSpecialTokens: skipSpecialTokens)
    }

    func convertTokenToId(_ token: String) -> Int? { inner.convertTokenToId(token) }

    func convertIdToToken(_ id: Int) -> String? { inner.convertIdToToken(id) }

    func applyChatTemplate(
        messages: [[String: any Sendable]],
        tools: [[String: any Sendable]]?,
        additionalContext: [String: any Sendable]?
    ) throws -> [Int] {
        try inner.applyChatTemplate(messages: messages, tools: tools, additionalContext: additionalContext)
    }
}
