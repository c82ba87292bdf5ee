"""What a forked process of a test finds imported already."""

import accelerate  # noqa: F401
import chats  # noqa: F401
import transformers.models.llama.modeling_llama

import attnpatch.cli.run_analyze
import attnpatch.demo.run  # noqa: F401

# transformers imports these when they are first used.
LATE = (transformers.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast)
