from rlhf_flows import MegatronModule


class RewardInference(MegatronModule):
    def setup(self):
        pass  # a rule needs no model

    def forward_step(self, data, iteration=0):
        ups = (data["response"][:, 1:] > data["response"][:, :-1]).float().mean(-1)
        drift = 0.0
        if "ref_logprobs" in data:
            drift = 0.01 * (data["logprobs"] - data["ref_logprobs"]).sum(-1)
        return {**data, "ups": ups, "rewards": ups - drift}
