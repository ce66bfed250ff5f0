"""Families that take videos under transformers, but images only in a compressed vLLM."""

from vlmzip.vllm.processing import CompressedInfo


class NoVideosInfo(CompressedInfo):
    """Before a stock processing info that would take videos."""

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        """Images, as many as the engine allows."""
        return {"image": None}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        """Refuse what a request may not have.

        Raises:
            ValueError: It has videos, or too many images.
        """
        if modality == "video" and num_items:
            raise ValueError(
                f"videos of a compressed {self.compression.family.name} are not supported with vLLM; "
                "send frames as images, or use vlmzip.compress with transformers"
            )
        super().validate_num_items(modality, num_items)  # type: ignore[misc]
