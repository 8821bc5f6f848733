//! Published neural systems on your own data: the facade over Kiln's crates, and the table of systems.

pub use kiln_btsbot as btsbot;
pub use kiln_chest_xray as chest_xray;
pub use kiln_cluster as cluster;
pub use kiln_compiler as compiler;
pub use kiln_connectome as connectome;
pub use kiln_core as core;
pub use kiln_data as data;
pub use kiln_eeg as eeg;
pub use kiln_gla as gla;
pub use kiln_http as http;
pub use kiln_hypernet as hypernet;
pub use kiln_kronecker_attention as kronecker_attention;
pub use kiln_megatron as megatron;
pub use kiln_mip as mip;
pub use kiln_neumeta as neumeta;
pub use kiln_nn as nn;
pub use kiln_oneflow as oneflow;
pub use kiln_ops as ops;
pub use kiln_ptq as ptq;
pub use kiln_stitch as stitch;
pub use kiln_tabpfn as tabpfn;
pub use kiln_tcnca as tcnca;

use kiln_core::System;

/// Every system in the binary, in the order of `kiln list`.
pub static SYSTEMS: &[&dyn System] = &[
    &kiln_gla::Gla,
    &kiln_tcnca::Tcnca,
    &kiln_kronecker_attention::Kronecker,
    &kiln_tabpfn::Tabpfn,
    &kiln_hypernet::Hypernet,
    &kiln_mip::Mip,
    &kiln_neumeta::NeuMeta,
    &kiln_stitch::Stitch,
    &kiln_ptq::Ptq,
    &kiln_megatron::Megatron,
    &kiln_oneflow::OneFlow,
    &kiln_connectome::Connectome,
    &kiln_eeg::Eeg,
    &kiln_btsbot::Btsbot,
    &kiln_chest_xray::ChestXray,
];
