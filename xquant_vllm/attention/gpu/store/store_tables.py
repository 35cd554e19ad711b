"""What the store kernels read of a layer's plan: tensors on the device, made once."""

from xquant_vllm.attention.gpu.tables.prediction_tables import prediction_tables
from xquant_vllm.attention.gpu.tables.rotation_tables import rotation_tables
from xquant_vllm.attention.gpu.tables.stream_tables import stream_tables
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.attention.plan import AttentionLayerPlan


class StoreTables:
    """Tables of a plan.

    Attributes:
        streams: of every stream of the layer's own pages.
        rotation: of the first stream's input, or None.
        prediction: of the first stream, or None.
    """

    def __init__(self, plan: AttentionLayerPlan) -> None:
        """Arrange everything.

        Raises:
            ValueError: the kernels cannot do what the plan demands; with the reason.
        """
        device = plan.device
        first = plan.layout.streams[0]
        if plan.rotation is not None and plan.rotation.size != first.num_heads * first.width:
            raise ValueError(
                f"a rotation of {plan.rotation.size} channels does not fit a stream of {first.num_heads * first.width}"
            )
        self.streams = [stream_tables(plan.layout, index, device) for index in range(len(plan.layout.streams))]
        self.rotation = rotation_tables(plan.rotation, device) if plan.rotation is not None else None
        self.prediction = (
            prediction_tables(plan.layouts, plan.prediction, device) if plan.prediction is not None else None
        )


@per_object
def prepare_store(plan: AttentionLayerPlan) -> StoreTables:
    """The tables, made on first use and forgotten together with the plan."""
    return StoreTables(plan)
