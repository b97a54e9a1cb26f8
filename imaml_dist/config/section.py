"""What all sections of a configuration have in common, and unions of sections told apart by their `kind`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Discriminator


class Section(BaseModel):
    """Frozen; unknown keys, numbers in quotes, booleans for numbers, nan and inf are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def by_kind(default: str, *kinds: str) -> Discriminator:
    """Tells the sections of a union apart by `kind`, which may be left out for the default."""

    def tag(value: Any) -> str | None:
        return value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", None)

    *most, last = (repr(kind) for kind in (default, *kinds))
    allowed = f"{', '.join(most)} or {last}" if most else last
    return Discriminator(tag, custom_error_type="kind", custom_error_message=f"Input should be {allowed}")
