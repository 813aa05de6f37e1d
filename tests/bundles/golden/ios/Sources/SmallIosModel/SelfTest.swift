import Foundation
import MLX
import MLXLMCommon

/// What a self-test found, in the form of edgebuild's evidence.
public struct SelfTestEvidence: Codable, Sendable {
    public struct Measurement: Codable, Sendable {
        public let name: String
        public let phase: String
        public let value: Double
        public let unit: String
        public let n: Int
        public let runtime: String
        public let machine: String
    }

    public let bundle: String
    public let version: String
    public let verdict: String
    public let measurements: [Measurement]
}

extension SmallIosModel {
    /// Runs the golden prompt on this device, prints PASS or FAIL and the evidence as one line of JSON, and returns it.
    ///
    /// FAIL means that the device computes something else than the machine that built this package.
    public static func selfTest() async throws -> SelfTestEvidence {
        let golden = try JSONDecoder().decode(Golden.self, from: Data(contentsOf: resource("golden", "json")))
        let found = try await load().perform { context in golden.run(on: context.model) }
        let logits = golden.worst(found.logits)
        let same = found.tokens.elementsEqual(golden.sure)
        let evidence = SelfTestEvidence(
            bundle: name,
            version: version,
            verdict: logits <= 1 && same ? "PASS" : "FAIL",
            measurements: [
                measurement("golden_logits", logits, "share of the tolerance", golden.top.count),
                measurement("golden_tokens", same ? 1 : 0, "1 where all are the same", golden.sure.count),
            ]
        )
        print(evidence.verdict, name, version)
        print(String(decoding: try JSONEncoder().encode(evidence), as: UTF8.self))
        return evidence
    }

    private static func measurement(_ name: String, _ value: Double, _ unit: String, _ n: Int) -> SelfTestEvidence.Measurement {
        let system = ProcessInfo.processInfo.operatingSystemVersionString
        return .init(name: name, phase: "self-test", value: value, unit: unit, n: n, runtime: "MLX Swift", machine: system)
    }
}

private struct Golden: Decodable, Sendable {
    struct Top: Decodable, Sendable {
        let token: Int
        let logit: Double
    }

    struct Tolerance: Decodable, Sendable {
        let relative: Double
        let absolute: Double
    }

    let prompt: [Int]
    let continuation: [Int]
    let certain: Int
    let top: [Top]
    let tolerance: Tolerance

    /// The tokens that must come out the same; behind them the choice was too close to be compared between devices.
    var sure: [Int] { Array(continuation.prefix(certain)) }

    /// The logits of `top` after the prompt, and the greedy continuation.
    func run(on model: any LanguageModel) -> (logits: [Double], tokens: [Int]) {
        let cache = model.newCache(parameters: nil)
        var input = prompt
        var logits: [Double] = []
        var tokens: [Int] = []
        repeat {
            let batch = MLXArray(input.map { Int32($0) }).expandedDimensions(axis: 0)
            let last = model(batch, cache: cache)[0..., -1, 0...].asType(.float32).asArray(Float.self)
            if tokens.isEmpty { logits = top.map { Double(last[$0.token]) } }
            let next = last.indices.max { last[$0] < last[$1] } ?? 0
            tokens.append(next)
            input = [next]
        } while tokens.count < certain
        return (logits, Array(tokens.prefix(certain)))
    }

    func worst(_ found: [Double]) -> Double {
        let largest = Double.greatestFiniteMagnitude  // what is no number differs by as much, and JSON has no infinity
        let shares = zip(found, top).map { abs($0 - $1.logit) / (tolerance.absolute + tolerance.relative * abs($1.logit)) }
        return shares.map { $0 < largest ? $0 : largest }.max() ?? largest
    }
}
