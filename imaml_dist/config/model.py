"""Which network: one of those that come with the package, or a user's own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from imaml_dist.config.section import Section

ActivationName = Literal["relu", "silu", "gelu", "softplus"]
"""See `models.activation`."""


class ActivatedConfig(Section):
    """What lies between the layers of the networks that come with the package."""

    activation: ActivationName = "relu"
    softplus_beta: float = Field(1.0, gt=0)
    """Inverse temperature: `log(1 + exp(beta x)) / beta`."""

    @model_validator(mode="after")
    def _beta_has_an_effect(self) -> ActivatedConfig:
        if self.activation != "softplus" and self.softplus_beta != 1.0:
            raise ValueError(
                f"model.softplus_beta: {self.softplus_beta!r} given, but {self.activation!r} has no softplus_beta; remove it or change "
                "model.activation"
            )
        return self


class Conv4Config(ActivatedConfig):
    """Four convolutional blocks: strided as the reference's Omniglot network, or pooled as the field's mini-ImageNet network."""

    kind: Literal["conv4"] = "conv4"
    channels: int = Field(64, ge=1, le=1 << 16)
    pooled: bool | None = None
    """null: strided for 28x28 images, pooled for others."""


class MLPConfig(ActivatedConfig):
    """A multilayer perceptron over flattened images."""

    kind: Literal["mlp"] = "mlp"
    hidden: list[Annotated[int, Field(ge=1)]] = Field([256, 128])
    activation: ActivationName = "silu"


class UserModelConfig(BaseModel):
    """A user's own network: `kind` names a factory called as `factory(image_shape=(C, H, W), way=N, **other fields)`."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)
    kind: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")

    @property
    def options(self) -> dict[str, Any]:
        """The other fields."""
        return dict(self.model_extra or {})


def _model_tag(value: Any) -> str | None:
    kind = value.get("kind", "conv4") if isinstance(value, dict) else getattr(value, "kind", None)
    return "user" if isinstance(kind, str) and ":" in kind else kind


ModelConfig = Annotated[
    Annotated[Conv4Config, Tag("conv4")] | Annotated[MLPConfig, Tag("mlp")] | Annotated[UserModelConfig, Tag("user")],
    Discriminator(
        _model_tag,
        custom_error_type="kind",
        custom_error_message="Input should be 'conv4', 'mlp' or a factory 'package.module:function'",
    ),
]
