"""The C structs of csrc/cpu/kivi/kivi_api.h, field by field."""

import ctypes

from xquant_vllm.attention.cpu.abi import AttentionCall, Input, Pages, Plan, StoreCall

_int64, _pointer = ctypes.c_int64, ctypes.c_void_p


class KiviPlan(ctypes.Structure):
    """``xquant_kivi_plan``."""

    _fields_ = [
        ("layer", Plan),
        ("key_bits", _int64),
        ("key_group_size", _int64),
        ("key_codes", _int64),
        ("key_scales", _int64),
        ("key_zeros", _int64),
        ("residual_block_size", _int64),
        ("residual_values", _int64),
        ("residual_dtype", _int64),
        ("residual_tokens", _int64),
        ("exact_step", _int64),
    ]


class Residual(ctypes.Structure):
    """``xquant_kivi_residual``."""

    _fields_ = [
        ("pages", Pages),
        ("num_blocks", _int64),
        ("block_table", _pointer),
        ("block_table_stride", _int64),
        ("max_blocks", _int64),
    ]


class KiviStoreCall(ctypes.Structure):
    """``xquant_kivi_store_call``."""

    _fields_ = [
        ("batch", AttentionCall),
        ("residual", Residual),
        ("values", StoreCall),
        ("keys", Input),
        ("residual_slot_mapping", _pointer),
    ]


class KiviAttentionCall(ctypes.Structure):
    """``xquant_kivi_attention_call``."""

    _fields_ = [("batch", AttentionCall), ("residual", Residual)]


STRUCTS = {
    "xquant_kivi_plan": KiviPlan,
    "xquant_kivi_residual": Residual,
    "xquant_kivi_store_call": KiviStoreCall,
    "xquant_kivi_attention_call": KiviAttentionCall,
}
"""By their C names."""
