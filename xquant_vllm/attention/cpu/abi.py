"""The C structs of csrc/cpu/api.h, field by field."""

import ctypes

_int64, _float, _pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Run(ctypes.Structure):
    """``xquant_run``."""

    _fields_ = [(name, _int64) for name in ("bits", "channels", "channel", "byte")]


class Band(ctypes.Structure):
    """``xquant_band``."""

    _fields_ = [(name, _int64) for name in ("begin", "end", "channel", "channels")]


class Head(ctypes.Structure):
    """``xquant_head``."""

    _fields_ = [
        ("codes", _int64),
        ("row_bytes", _int64),
        ("channels", _int64),
        ("num_runs", _int64),
        ("num_bands", _int64),
        ("runs", ctypes.POINTER(Run)),
        ("bands", ctypes.POINTER(Band)),
        ("step", _pointer),
        ("zero", _pointer),
        ("inverse_step", _pointer),
        ("middle", _pointer),
        ("worth", _pointer),
        ("channels_worth", _float),
    ]


class Stream(ctypes.Structure):
    """``xquant_stream``."""

    _fields_ = [
        ("num_heads", _int64),
        ("width", _int64),
        ("allocated", _int64),
        ("outlier_channels", _int64),
        ("heads", ctypes.POINTER(Head)),
        ("scales", _int64),
        ("zeros", _int64),
        ("outliers", _int64),
    ]


class Term(ctypes.Structure):
    """``xquant_term``."""

    _fields_ = [("stream", Stream), ("page", _int64), ("adds", _int64)]


class Latent(ctypes.Structure):
    """``xquant_latent``."""

    _fields_ = [("terms", ctypes.POINTER(Term)), ("num_terms", _int64), ("num_heads", _int64), ("width", _int64)]


class Plan(ctypes.Structure):
    """``xquant_plan``."""

    _fields_ = [
        ("streams", ctypes.POINTER(Stream)),
        ("num_streams", _int64),
        ("key", Latent),
        ("value", Latent),
        ("prediction", Latent),
        ("prediction_matrix", _pointer),
        ("rotation_signs", _pointer),
        ("rotation_mix", _pointer),
        ("rotation_block", _int64),
        ("block_size", _int64),
        ("num_heads", _int64),
        ("num_kv_heads", _int64),
        ("head_size", _int64),
        ("key_absorbed", _int64),
        ("up_key", _pointer),
        ("key_integers", _pointer),
        ("key_words", _pointer),
        ("key_units", _pointer),
        ("key_sums", _pointer),
        ("key_scale_groups", _int64),
        ("key_tiles", _pointer),
        ("key_first_tiles", _pointer),
        ("shares_latents", _int64),
        ("key_bytes", _pointer),
        ("key_byte_tiles", _pointer),
        ("key_byte_offsets", _pointer),
        ("key_byte_units", _pointer),
        ("up_value", _pointer),
        ("key_bias", _pointer),
        ("value_bias", _pointer),
        ("key_norm", _pointer),
        ("sinks", _pointer),
        ("rope", _pointer),
        ("rotary_size", _int64),
        ("rotary_positions", _int64),
        ("rotary_interleaved", _int64),
        ("sliding_window", _int64),
        ("key_norm_eps", _float),
        ("scale", _float),
        ("soft_cap", _float),
    ]


class Pages(ctypes.Structure):
    """``xquant_pages``."""

    _fields_ = [("data", _pointer), ("stride", _int64)]


class Input(ctypes.Structure):
    """``xquant_input``."""

    _fields_ = [("data", _pointer), ("stride", _int64), ("dtype", _int64)]


class StoreCall(ctypes.Structure):
    """``xquant_store_call``."""

    _fields_ = [
        ("pages", ctypes.POINTER(Pages)),
        ("num_blocks", _int64),
        ("slot_mapping", _pointer),
        ("num_tokens", _int64),
        ("inputs", ctypes.POINTER(Input)),
    ]


class AttentionCall(ctypes.Structure):
    """``xquant_attention_call``."""

    _fields_ = [
        ("pages", ctypes.POINTER(Pages)),
        ("num_blocks", _int64),
        ("query", _pointer),
        ("query_token_stride", _int64),
        ("query_head_stride", _int64),
        ("output", _pointer),
        ("output_token_stride", _int64),
        ("output_head_stride", _int64),
        ("dtype", _int64),
        ("num_tokens", _int64),
        ("query_start_loc", _pointer),
        ("seq_lens", _pointer),
        ("block_table", _pointer),
        ("block_table_stride", _int64),
        ("max_blocks", _int64),
        ("num_seqs", _int64),
        ("exact_keys", _pointer),
        ("exact_values", _pointer),
        ("exact_from", _int64),
    ]


class ReadCall(ctypes.Structure):
    """``xquant_read_call``."""

    _fields_ = [
        ("pages", ctypes.POINTER(Pages)),
        ("num_blocks", _int64),
        ("slots", _pointer),
        ("num_tokens", _int64),
        ("latents", _pointer),
        ("output", _pointer),
        ("dtype", _int64),
        ("values", _int64),
        ("first_term", _int64),
    ]


class FinishCall(ctypes.Structure):
    """``xquant_finish_call``."""

    _fields_ = [
        ("positions", _pointer),
        ("num_tokens", _int64),
        ("keys", _pointer),
        ("key_token_stride", _int64),
        ("key_head_stride", _int64),
        ("values", _pointer),
        ("value_token_stride", _int64),
        ("value_head_stride", _int64),
        ("dtype", _int64),
    ]


class HotPlaces(ctypes.Structure):
    """``xquant_hot_places``."""

    _fields_ = [("data", _pointer), ("tokens", _pointer), ("channels", _pointer), ("contiguous", _int64)]


class HotLayer(ctypes.Structure):
    """``xquant_hot_layer``."""

    _fields_ = [
        ("dtype", _int64),
        ("shared", _int64),
        ("up_key", _pointer),
        ("up_value", _pointer),
        ("keys", HotPlaces),
        ("values", HotPlaces),
        ("block_stride", _int64),
        ("head_stride", _int64),
        ("num_hot_blocks", _int64),
    ]


class HotCall(ctypes.Structure):
    """``xquant_hot_call``."""

    _fields_ = [
        ("pages", ctypes.POINTER(Pages)),
        ("num_blocks", _int64),
        ("slots", _pointer),
        ("positions", _pointer),
        ("hot_slots", _pointer),
        ("num_tokens", _int64),
        ("latents", _pointer),
        ("first_term", _int64),
    ]


STRUCTS = {
    "xquant_run": Run,
    "xquant_band": Band,
    "xquant_head": Head,
    "xquant_stream": Stream,
    "xquant_term": Term,
    "xquant_latent": Latent,
    "xquant_plan": Plan,
    "xquant_pages": Pages,
    "xquant_input": Input,
    "xquant_store_call": StoreCall,
    "xquant_attention_call": AttentionCall,
    "xquant_read_call": ReadCall,
    "xquant_finish_call": FinishCall,
    "xquant_hot_places": HotPlaces,
    "xquant_hot_layer": HotLayer,
    "xquant_hot_call": HotCall,
}
"""By their C names."""
