"""The decoders whose shapes kernels are compiled and timed for."""

from loraplex_kernels.cases import ModelShapes

LLAMA_3_8B = ModelShapes("Llama-3-8B", 4096, 14336, 32, 8, 128, 32)
QWEN_2_5_7B = ModelShapes("Qwen2.5-7B", 3584, 18944, 28, 4, 128, 28)
MISTRAL_7B = ModelShapes("Mistral-7B", 4096, 14336, 32, 8, 128, 32)
MODELS = {shapes.name: shapes for shapes in (LLAMA_3_8B, QWEN_2_5_7B, MISTRAL_7B)}

OTHER_HEADS = (
    ModelShapes("Llama-2-7B", 4096, 11008, 32, 32, 128, 32),
    ModelShapes("SmolLM2-135M", 576, 1536, 9, 3, 64, 30),
    ModelShapes("Qwen2.5-0.5B", 896, 4864, 14, 2, 64, 24),
    ModelShapes("Phi-2", 2560, 10240, 32, 32, 80, 32),
    ModelShapes("Phi-3-mini", 3072, 8192, 32, 32, 96, 32),
    ModelShapes("Gemma-2B", 2048, 16384, 8, 1, 256, 18),
    ModelShapes("Gemma-2-9B", 3584, 14336, 16, 8, 256, 42),
)
"""For sizes and groups of heads that the three above do not have."""
