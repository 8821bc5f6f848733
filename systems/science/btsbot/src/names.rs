//! The names of parameters elsewhere: in PyTorch checkpoints of the public package, and in files that number no head layer.

use kiln_core::TensorFile;

use crate::model::Mode;

/// The public package's places of layers, by the network's mode, and what they are called here.
fn public(mode: Mode) -> &'static [(&'static str, &'static str)] {
    match mode {
        Mode::MmCnn => &[
            ("conv_layers.0.", "conv1."),
            ("conv_layers.2.", "conv2."),
            ("conv_layers.6.", "conv3."),
            ("conv_layers.8.", "conv4."),
            ("metadata_branch.0.", "meta_bn."),
            ("metadata_branch.1.", "meta_fc1."),
            ("metadata_branch.4.", "meta_fc2."),
            ("combined_head.0.", "comb_fc.0."),
            ("combined_head.2.", "comb_fc.1."),
            ("combined_head.5.", "out."),
        ],
        Mode::UmCnn => &[
            ("conv_layers.0.", "conv1."),
            ("conv_layers.2.", "conv2."),
            ("conv_layers.6.", "conv3."),
            ("conv_layers.8.", "conv4."),
            ("head.0.", "comb_fc.0."),
            ("head.2.", "comb_fc.1."),
            ("head.5.", "out."),
        ],
        Mode::UmNn => &[
            ("network.0.", "meta_bn."),
            ("network.1.", "meta_fc1."),
            ("network.4.", "meta_fc2."),
            ("network.6.", "out."),
        ],
    }
}

/// Gives tensors the names that they have here, whichever naming they come with.
pub fn from_elsewhere(file: &mut TensorFile, mode: Mode) {
    let names: Vec<String> = file.names().map(str::to_string).collect();
    for name in names {
        // Counts of batches, which no network needs.
        if name.ends_with(".num_batches_tracked") {
            let _ = file.take(&name);
            continue;
        }
        let map = public(mode)
            .iter()
            .chain(&[("comb_fc.weight", "comb_fc.0.weight"), ("comb_fc.bias", "comb_fc.0.bias")]);
        if let Some((theirs, ours)) = map.into_iter().find(|(theirs, _)| name.starts_with(theirs)) {
            file.rename(&name, name.replacen(theirs, ours, 1));
        }
    }
}

/// The other way: names that the public package loads.
pub fn to_public(file: &mut TensorFile, mode: Mode) {
    let names: Vec<String> = file.names().map(str::to_string).collect();
    for name in names {
        if let Some((theirs, ours)) = public(mode).iter().find(|(_, ours)| name.starts_with(ours)) {
            file.rename(&name, name.replacen(ours, theirs, 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    use crate::model::MmCnnConfig;

    #[test]
    fn every_network_comes_back_under_the_public_names() {
        for mode in [Mode::MmCnn, Mode::UmCnn, Mode::UmNn] {
            let config = MmCnnConfig {
                head_hidden: vec![6, 4],
                ..MmCnnConfig::new().with_channels([2, 3]).with_mode(mode)
            };
            let network = config.init(&Device::flex());
            let mut file = TensorFile::from_module(&network);
            let ours: Vec<String> = file.names().map(str::to_string).collect();
            to_public(&mut file, mode);
            let places = ["conv_layers.", "metadata_branch.", "combined_head.", "head.", "network."];
            assert!(file.names().all(|name| places.iter().any(|place| name.starts_with(place))), "{mode:?}");
            from_elsewhere(&mut file, mode);
            assert_eq!(file.names().collect::<Vec<_>>(), ours);
            assert!(file.into_module(network).is_ok());
        }
    }
}
