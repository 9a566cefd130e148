r"""PPO with a Hugging Face sentiment classifier in place of the reward model.

    python -m examples.reviews --only-data && python -m examples.reviews.classifier
    rlhf-flows train sft -c examples/reviews/sft.yaml
    rlhf-flows train examples.sentiment_ppo:my-ppo run_name=sentiment model=run:reviews-sft \
        prompts=reviews/prompts.jsonl reward.args.path=reviews/classifier ppo.kl_coef=0.1 \
        generation.max_new_tokens=24 generation.top_p=0.9 optimizer.learning_rate=3e-4
"""

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_flows import ModelInterface, find_recipe, register_interface, register_recipe


class SentimentScoring(ModelInterface):
    def __init__(self, name, *, path):
        super().__init__(name)
        self.path = path

    def setup(self):
        self.model = AutoModelForSequenceClassification.from_pretrained(self.path).eval()
        self.score_tokenizer = AutoTokenizer.from_pretrained(self.path)

    @torch.no_grad()
    def inference(self, data):
        # The policy's completions as text, in the tokens of the classifier.
        encoding = self.score_tokenizer(
            data["completion"], return_tensors="pt", padding=True, truncation=True
        )
        return {"reward": self.model(**encoding).logits[..., -1].float()}


register_interface("sentiment_scoring", SentimentScoring)
register_recipe(find_recipe("ppo").derived("my-ppo", reward={"interface": "sentiment_scoring"}))
