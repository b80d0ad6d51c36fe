"""The models with a short name: where they are, and their shape, for plans on a machine that has not fetched them.

The numbers are what the authors published, written down by hand and not read from the hub. They are used for ``job=plan`` alone, and only
while a model's config.json is not at hand; ``parameters`` is there to check the others, since it is published on its own. A model that is
loaded is what its own config.json says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class NamedModel:
    """A model that has a short name. Final.

    Attributes:
        name: The short name.
        repo: Its id on the Hugging Face hub.
        title: For people.
        family: Its ``model_type`` in transformers.
        parameters: How many it has, in millions.
        n_layers, n_heads, n_kv_heads, d_model, d_head, d_mlp, d_vocab: Its shape; ``d_mlp`` is that of one expert in a mixture.
        tied: Whether embedding and unembedding are the same matrix.
        gated: Whether a licence must be accepted on the hub.
        note: What else to know.
        own_code: Whether its files name Python code of its own that transformers has long taken over.
        settings: What its config.json says besides that bears on its size.
    """

    name: str
    repo: str
    title: str
    family: str
    parameters: float
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    tied: bool = False
    gated: bool = False
    note: str = ""
    own_code: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """What ``dtype="auto"`` means: float32 where that fits a common machine, bfloat16 from two billion parameters on."""
        return "bfloat16" if self.parameters >= 2000 else "float32"

    @property
    def config(self) -> dict[str, Any]:
        """The shape in the words of its family's config.json, without ``model_type``."""
        words = {**_WORDS, **_OTHER_WORDS.get(self.family, {})}
        shape = {word: getattr(self, name) for name, word in words.items() if word}
        return {**shape, "tie_word_embeddings": self.tied, **self.settings}

    @property
    def summary(self) -> str:
        """Title and shape in one sentence."""
        size = f"{self.parameters:.0f} million" if self.parameters < 1000 else f"{self.parameters / 1000:.3g} billion"
        shared = "" if self.n_kv_heads == self.n_heads else " on one key and value" if self.n_kv_heads == 1 else ", grouped keys and values"
        experts = self.settings.get("num_experts", self.settings.get("num_local_experts"))
        mixture = f", {experts} experts a layer" if experts else ""
        return f"{self.title}: {self.n_layers} layers of {self.n_heads} heads{shared}{mixture}, {size} parameters."


_WORDS = {
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_model": "hidden_size",
    "d_head": "head_dim",
    "d_mlp": "intermediate_size",
    "d_vocab": "vocab_size",
}
_PLAIN = {"n_kv_heads": "", "d_head": ""}
_OTHER_WORDS = {
    "gpt2": {**_PLAIN, "d_mlp": "n_inner"},
    "gptj": {**_PLAIN, "d_mlp": "n_inner"},
    "gpt_neo": _PLAIN,
    "gpt_neox": _PLAIN,
    "opt": {**_PLAIN, "d_mlp": "ffn_dim"},
    "bloom": {**_PLAIN, "d_mlp": ""},
    "falcon": {"n_kv_heads": "num_kv_heads", "d_head": "", "d_mlp": "ffn_hidden_size"},
    "qwen3_moe": {"d_mlp": "moe_intermediate_size"},
}
"""Where a family has another word; empty where it has none, because the number follows from others."""


def _neo(n_layers: int) -> dict[str, Any]:
    return {"attention_types": [[["global", "local"], n_layers // 2]]}


_M = NamedModel
# fmt: off
_MODELS = (
    # name, repo, title, family, millions of parameters, layers, heads, key/value heads, d_model, d_head, d_mlp, d_vocab
    _M("gpt2", "openai-community/gpt2", "GPT-2 small", "gpt2", 124.4, 12, 12, 12, 768, 64, 3072, 50257, tied=True,
       note="The paper's first model."),
    _M("gpt2_medium", "openai-community/gpt2-medium", "GPT-2 medium", "gpt2", 354.8, 24, 16, 16, 1024, 64, 4096, 50257, tied=True),
    _M("gpt2_large", "openai-community/gpt2-large", "GPT-2 large", "gpt2", 774.0, 36, 20, 20, 1280, 64, 5120, 50257, tied=True),
    _M("gpt2_xl", "openai-community/gpt2-xl", "GPT-2 XL", "gpt2", 1557.6, 48, 25, 25, 1600, 64, 6400, 50257, tied=True),
    _M("distilgpt2", "distilbert/distilgpt2", "DistilGPT-2", "gpt2", 81.9, 6, 12, 12, 768, 64, 3072, 50257, tied=True),

    _M("pythia_70m", "EleutherAI/pythia-70m", "Pythia 70M", "gpt_neox", 70.4, 6, 8, 8, 512, 64, 2048, 50304),
    _M("pythia_160m", "EleutherAI/pythia-160m", "Pythia 160M", "gpt_neox", 162.3, 12, 12, 12, 768, 64, 3072, 50304),
    _M("pythia_410m", "EleutherAI/pythia-410m", "Pythia 410M", "gpt_neox", 405.3, 24, 16, 16, 1024, 64, 4096, 50304),
    _M("pythia_1b", "EleutherAI/pythia-1b", "Pythia 1B", "gpt_neox", 1011.8, 16, 8, 8, 2048, 256, 8192, 50304),
    _M("pythia_1_4b", "EleutherAI/pythia-1.4b", "Pythia 1.4B", "gpt_neox", 1414.6, 24, 16, 16, 2048, 128, 8192, 50304),
    _M("pythia_2_8b", "EleutherAI/pythia-2.8b", "Pythia 2.8B", "gpt_neox", 2775.2, 32, 32, 32, 2560, 80, 10240, 50304),
    _M("pythia_6_9b", "EleutherAI/pythia-6.9b", "Pythia 6.9B", "gpt_neox", 6857.3, 32, 32, 32, 4096, 128, 16384, 50432),
    _M("pythia_12b", "EleutherAI/pythia-12b", "Pythia 12B", "gpt_neox", 11846.1, 36, 40, 40, 5120, 128, 20480, 50688),
    _M("gpt_neo_125m", "EleutherAI/gpt-neo-125m", "GPT-Neo 125M", "gpt_neo", 125.2, 12, 12, 12, 768, 64, 3072, 50257, tied=True,
       settings=_neo(12)),
    _M("gpt_neo_1_3b", "EleutherAI/gpt-neo-1.3B", "GPT-Neo 1.3B", "gpt_neo", 1315.6, 24, 16, 16, 2048, 128, 8192, 50257, tied=True,
       settings=_neo(24)),
    _M("gpt_neo_2_7b", "EleutherAI/gpt-neo-2.7B", "GPT-Neo 2.7B", "gpt_neo", 2651.3, 32, 20, 20, 2560, 128, 10240, 50257, tied=True,
       settings=_neo(32)),
    _M("gptj_6b", "EleutherAI/gpt-j-6b", "GPT-J 6B", "gptj", 6050.9, 28, 16, 16, 4096, 256, 16384, 50400),

    _M("opt_125m", "facebook/opt-125m", "OPT 125M", "opt", 125.2, 12, 12, 12, 768, 64, 3072, 50272, tied=True),
    _M("opt_1_3b", "facebook/opt-1.3b", "OPT 1.3B", "opt", 1315.8, 24, 32, 32, 2048, 64, 8192, 50272, tied=True),
    _M("opt_6_7b", "facebook/opt-6.7b", "OPT 6.7B", "opt", 6658.5, 32, 32, 32, 4096, 128, 16384, 50272, tied=True),
    _M("bloom_560m", "bigscience/bloom-560m", "BLOOM 560M", "bloom", 559.2, 24, 16, 16, 1024, 64, 4096, 250880, tied=True),
    _M("bloom_7b1", "bigscience/bloom-7b1", "BLOOM 7.1B", "bloom", 7069.0, 30, 32, 32, 4096, 128, 16384, 250880, tied=True),
    _M("falcon_7b", "tiiuae/falcon-7b", "Falcon 7B", "falcon", 6921.7, 32, 71, 1, 4544, 64, 18176, 65024, tied=True, own_code=True,
       settings={"multi_query": True}),
    _M("falcon_40b", "tiiuae/falcon-40b", "Falcon 40B", "falcon", 41303.3, 60, 128, 8, 8192, 64, 32768, 65024, tied=True, own_code=True,
       settings={"new_decoder_architecture": True}),

    _M("llama2_7b", "meta-llama/Llama-2-7b-hf", "Llama 2 7B", "llama", 6738.4, 32, 32, 32, 4096, 128, 11008, 32000, gated=True),
    _M("llama2_7b_chat", "meta-llama/Llama-2-7b-chat-hf", "Llama 2 7B, chat", "llama", 6738.4, 32, 32, 32, 4096, 128, 11008, 32000,
       gated=True, note="The paper's second model."),
    _M("llama2_13b", "meta-llama/Llama-2-13b-hf", "Llama 2 13B", "llama", 13015.9, 40, 40, 40, 5120, 128, 13824, 32000, gated=True),
    _M("llama2_70b", "meta-llama/Llama-2-70b-hf", "Llama 2 70B", "llama", 68976.6, 80, 64, 8, 8192, 128, 28672, 32000, gated=True),
    _M("llama3_8b", "meta-llama/Meta-Llama-3-8B", "Llama 3 8B", "llama", 8030.3, 32, 32, 8, 4096, 128, 14336, 128256, gated=True),
    _M("llama3_70b", "meta-llama/Meta-Llama-3-70B", "Llama 3 70B", "llama", 70553.7, 80, 64, 8, 8192, 128, 28672, 128256, gated=True),
    _M("llama3_1_8b", "meta-llama/Llama-3.1-8B", "Llama 3.1 8B", "llama", 8030.3, 32, 32, 8, 4096, 128, 14336, 128256, gated=True),
    _M("llama3_1_8b_instruct", "meta-llama/Llama-3.1-8B-Instruct", "Llama 3.1 8B, instruct", "llama", 8030.3, 32, 32, 8, 4096, 128, 14336,
       128256, gated=True),
    _M("llama3_1_70b", "meta-llama/Llama-3.1-70B", "Llama 3.1 70B", "llama", 70553.7, 80, 64, 8, 8192, 128, 28672, 128256, gated=True),
    _M("llama3_2_1b", "meta-llama/Llama-3.2-1B", "Llama 3.2 1B", "llama", 1235.8, 16, 32, 8, 2048, 64, 8192, 128256, tied=True, gated=True),
    _M("llama3_2_3b", "meta-llama/Llama-3.2-3B", "Llama 3.2 3B", "llama", 3212.7, 28, 24, 8, 3072, 128, 8192, 128256, tied=True,
       gated=True),
    _M("llama3_3_70b_instruct", "meta-llama/Llama-3.3-70B-Instruct", "Llama 3.3 70B, instruct", "llama", 70553.7, 80, 64, 8, 8192, 128,
       28672, 128256, gated=True),
    _M("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama 1.1B, chat", "llama", 1100.0, 22, 32, 4, 2048, 64, 5632, 32000),
    _M("smollm2_135m", "HuggingFaceTB/SmolLM2-135M", "SmolLM2 135M", "llama", 134.5, 30, 9, 3, 576, 64, 1536, 49152, tied=True),
    _M("smollm2_360m", "HuggingFaceTB/SmolLM2-360M", "SmolLM2 360M", "llama", 361.8, 32, 15, 5, 960, 64, 2560, 49152, tied=True),
    _M("smollm2_1_7b", "HuggingFaceTB/SmolLM2-1.7B", "SmolLM2 1.7B", "llama", 1711.4, 24, 32, 32, 2048, 64, 8192, 49152, tied=True),
    _M("smollm3_3b", "HuggingFaceTB/SmolLM3-3B", "SmolLM3 3B", "smollm3", 3075.1, 36, 16, 4, 2048, 128, 11008, 128256, tied=True),
    _M("yi_6b", "01-ai/Yi-6B", "Yi 6B", "llama", 6061.0, 32, 32, 4, 4096, 128, 11008, 64000),
    _M("yi_34b", "01-ai/Yi-34B", "Yi 34B", "llama", 34388.9, 60, 56, 8, 7168, 128, 20480, 64000),
    _M("deepseek_7b", "deepseek-ai/deepseek-llm-7b-base", "DeepSeek LLM 7B", "llama", 6910.4, 30, 32, 32, 4096, 128, 11008, 102400),
    _M("deepseek_r1_qwen_1_5b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "DeepSeek R1 in Qwen 1.5B", "qwen2", 1777.1, 28, 12, 2, 1536,
       128, 8960, 151936),
    _M("deepseek_r1_llama_8b", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "DeepSeek R1 in Llama 8B", "llama", 8030.3, 32, 32, 8, 4096,
       128, 14336, 128256),

    _M("mistral_7b", "mistralai/Mistral-7B-v0.1", "Mistral 7B", "mistral", 7241.7, 32, 32, 8, 4096, 128, 14336, 32000,
       note="Sliding attention window."),
    _M("mistral_7b_v0_3", "mistralai/Mistral-7B-v0.3", "Mistral 7B v0.3", "mistral", 7248.0, 32, 32, 8, 4096, 128, 14336, 32768),
    _M("mistral_nemo_12b", "mistralai/Mistral-Nemo-Base-2407", "Mistral NeMo 12B", "mistral", 12247.8, 40, 32, 8, 5120, 128, 14336, 131072),
    _M("mistral_small_24b", "mistralai/Mistral-Small-24B-Base-2501", "Mistral Small 24B", "mistral", 23572.4, 40, 32, 8, 5120, 128, 32768,
       131072),
    _M("mixtral_8x7b", "mistralai/Mixtral-8x7B-v0.1", "Mixtral 8x7B", "mixtral", 46702.8, 32, 32, 8, 4096, 128, 14336, 32000,
       settings={"num_local_experts": 8, "num_experts_per_tok": 2}),

    _M("qwen2_5_0_5b", "Qwen/Qwen2.5-0.5B", "Qwen2.5 0.5B", "qwen2", 494.0, 24, 14, 2, 896, 64, 4864, 151936, tied=True),
    _M("qwen2_5_1_5b", "Qwen/Qwen2.5-1.5B", "Qwen2.5 1.5B", "qwen2", 1543.7, 28, 12, 2, 1536, 128, 8960, 151936, tied=True),
    _M("qwen2_5_3b", "Qwen/Qwen2.5-3B", "Qwen2.5 3B", "qwen2", 3085.9, 36, 16, 2, 2048, 128, 11008, 151936, tied=True),
    _M("qwen2_5_7b", "Qwen/Qwen2.5-7B", "Qwen2.5 7B", "qwen2", 7615.6, 28, 28, 4, 3584, 128, 18944, 152064),
    _M("qwen2_5_14b", "Qwen/Qwen2.5-14B", "Qwen2.5 14B", "qwen2", 14770.0, 48, 40, 8, 5120, 128, 13824, 152064),
    _M("qwen2_5_32b", "Qwen/Qwen2.5-32B", "Qwen2.5 32B", "qwen2", 32763.9, 64, 40, 8, 5120, 128, 27648, 152064),
    _M("qwen2_5_72b", "Qwen/Qwen2.5-72B", "Qwen2.5 72B", "qwen2", 72706.2, 80, 64, 8, 8192, 128, 29568, 152064),
    _M("qwen3_0_6b", "Qwen/Qwen3-0.6B", "Qwen3 0.6B", "qwen3", 596.0, 28, 16, 8, 1024, 128, 3072, 151936, tied=True),
    _M("qwen3_1_7b", "Qwen/Qwen3-1.7B", "Qwen3 1.7B", "qwen3", 1720.6, 28, 16, 8, 2048, 128, 6144, 151936, tied=True),
    _M("qwen3_4b", "Qwen/Qwen3-4B", "Qwen3 4B", "qwen3", 4022.5, 36, 32, 8, 2560, 128, 9728, 151936, tied=True),
    _M("qwen3_8b", "Qwen/Qwen3-8B", "Qwen3 8B", "qwen3", 8190.7, 36, 32, 8, 4096, 128, 12288, 151936),
    _M("qwen3_14b", "Qwen/Qwen3-14B", "Qwen3 14B", "qwen3", 14768.3, 40, 40, 8, 5120, 128, 17408, 151936),
    _M("qwen3_32b", "Qwen/Qwen3-32B", "Qwen3 32B", "qwen3", 32762.1, 64, 64, 8, 5120, 128, 25600, 151936),
    _M("qwen3_30b_a3b", "Qwen/Qwen3-30B-A3B", "Qwen3 30B-A3B", "qwen3_moe", 30532.1, 48, 32, 4, 2048, 128, 768, 151936,
       settings={"num_experts": 128, "num_experts_per_tok": 8, "intermediate_size": 6144}),

    _M("gemma_2b", "google/gemma-2b", "Gemma 2B", "gemma", 2506.2, 18, 8, 1, 2048, 256, 16384, 256000, tied=True, gated=True),
    _M("gemma_7b", "google/gemma-7b", "Gemma 7B", "gemma", 8537.7, 28, 16, 16, 3072, 256, 24576, 256000, tied=True, gated=True),
    _M("gemma2_2b", "google/gemma-2-2b", "Gemma 2 2B", "gemma2", 2614.3, 26, 8, 4, 2304, 256, 9216, 256000, tied=True, gated=True),
    _M("gemma2_2b_it", "google/gemma-2-2b-it", "Gemma 2 2B, instruct", "gemma2", 2614.3, 26, 8, 4, 2304, 256, 9216, 256000, tied=True,
       gated=True),
    _M("gemma2_9b", "google/gemma-2-9b", "Gemma 2 9B", "gemma2", 9241.7, 42, 16, 8, 3584, 256, 14336, 256000, tied=True, gated=True),
    _M("gemma2_27b", "google/gemma-2-27b", "Gemma 2 27B", "gemma2", 27227.1, 46, 32, 16, 4608, 128, 36864, 256000, tied=True, gated=True),
    _M("gemma3_270m", "google/gemma-3-270m", "Gemma 3 270M", "gemma3_text", 268.1, 18, 4, 1, 640, 256, 2048, 262144, tied=True, gated=True),
    _M("gemma3_1b", "google/gemma-3-1b-pt", "Gemma 3 1B", "gemma3_text", 999.9, 26, 4, 1, 1152, 256, 6912, 262144, tied=True, gated=True),

    _M("phi1_5", "microsoft/phi-1_5", "Phi-1.5", "phi", 1418.3, 24, 32, 32, 2048, 64, 8192, 51200),
    _M("phi2", "microsoft/phi-2", "Phi-2", "phi", 2779.7, 32, 32, 32, 2560, 80, 10240, 51200),
    _M("phi3_mini", "microsoft/Phi-3-mini-4k-instruct", "Phi-3 mini, instruct", "phi3", 3821.1, 32, 32, 32, 3072, 96, 8192, 32064,
       own_code=True),
    _M("phi4", "microsoft/phi-4", "Phi-4", "phi3", 14659.5, 40, 40, 10, 5120, 128, 17920, 100352),
    _M("phi4_mini", "microsoft/Phi-4-mini-instruct", "Phi-4 mini, instruct", "phi3", 3836.0, 32, 24, 8, 3072, 128, 8192, 200064, tied=True,
       own_code=True),

    _M("olmo_1b", "allenai/OLMo-1B-hf", "OLMo 1B", "olmo", 1176.8, 16, 16, 16, 2048, 128, 8192, 50304, tied=True),
    _M("olmo_7b", "allenai/OLMo-7B-hf", "OLMo 7B", "olmo", 6888.1, 32, 32, 32, 4096, 128, 11008, 50304),
    _M("olmo2_1b", "allenai/OLMo-2-0425-1B", "OLMo 2 1B", "olmo2", 1484.9, 16, 16, 16, 2048, 128, 8192, 100352),
    _M("olmo2_7b", "allenai/OLMo-2-1124-7B", "OLMo 2 7B", "olmo2", 7298.6, 32, 32, 32, 4096, 128, 11008, 100352),
    _M("olmo2_13b", "allenai/OLMo-2-1124-13B", "OLMo 2 13B", "olmo2", 13716.2, 40, 40, 40, 5120, 128, 13824, 100352),
    _M("olmo3_7b", "allenai/Olmo-3-1025-7B", "OLMo 3 7B", "olmo3", 7298.0, 32, 32, 32, 4096, 128, 11008, 100278),
    _M("olmoe_1b_7b", "allenai/OLMoE-1B-7B-0924", "OLMoE 1B-7B", "olmoe", 6919.2, 16, 16, 16, 2048, 128, 1024, 50304,
       settings={"num_experts": 64, "num_experts_per_tok": 8}),
    _M("stablelm_3b", "stabilityai/stablelm-3b-4e1t", "StableLM 3B", "stablelm", 2795.4, 32, 32, 32, 2560, 80, 6912, 50304),
    _M("stablelm2_1_6b", "stabilityai/stablelm-2-1_6b", "StableLM 2 1.6B", "stablelm", 1644.5, 24, 32, 32, 2048, 64, 5632, 100352,
       settings={"use_qkv_bias": True}),
    _M("starcoder2_3b", "bigcode/starcoder2-3b", "StarCoder2 3B", "starcoder2", 3030.4, 30, 24, 2, 3072, 128, 12288, 49152, tied=True),
    _M("starcoder2_7b", "bigcode/starcoder2-7b", "StarCoder2 7B", "starcoder2", 7173.9, 32, 36, 4, 4608, 128, 18432, 49152, tied=True),
    _M("granite3_2b", "ibm-granite/granite-3.0-2b-base", "Granite 3.0 2B", "granite", 2533.5, 40, 32, 8, 2048, 64, 8192, 49155, tied=True),
    _M("granite3_8b", "ibm-granite/granite-3.0-8b-base", "Granite 3.0 8B", "granite", 8170.8, 40, 32, 8, 4096, 128, 12800, 49155,
       tied=True),
    _M("glm4_9b", "zai-org/glm-4-9b-hf", "GLM-4 9B", "glm", 9400.0, 40, 32, 2, 4096, 128, 13696, 151552),
    _M("glm4_9b_0414", "zai-org/GLM-4-9B-0414", "GLM-4 9B of 2025", "glm4", 9400.3, 40, 32, 2, 4096, 128, 13696, 151552,
       settings={"attention_bias": True}),
    _M("command_r", "CohereLabs/c4ai-command-r-v01", "Command R 35B", "cohere", 34980.8, 40, 64, 64, 8192, 128, 22528, 256000, tied=True,
       gated=True),
    _M("command_r7b", "CohereLabs/c4ai-command-r7b-12-2024", "Command R 7B", "cohere2", 8028.0, 32, 32, 8, 4096, 128, 14336, 256000,
       tied=True, gated=True),
    _M("gpt_oss_20b", "openai/gpt-oss-20b", "gpt-oss 20B", "gpt_oss", 20914.8, 24, 64, 8, 2880, 64, 2880, 201088,
       settings={"num_local_experts": 32, "num_experts_per_tok": 4}),
)
# fmt: on

HUB_MODELS: dict[str, NamedModel] = {model.name: model for model in _MODELS}
"""The models with a short name, besides those that ship in the package."""
