//! The names of parameters in `braindecode`, old and new.

use kiln_core::TensorFile;

/// What our names have in place of theirs. Weight norm has two namings: of old `weight_g` and `weight_v`, as here, and
/// `parametrizations.weight.original0` and `original1`.
const NAMES: [(&str, &str); 4] = [
    ("temporal_blocks.temporal_block_", "temporal_blocks."),
    (".parametrizations.weight.original0", ".weight_g"),
    (".parametrizations.weight.original1", ".weight_v"),
    (".parametrizations.weight.original", ".weight"),
];

/// Gives the tensors of a `braindecode` state dictionary the names that they have here, whichever naming it uses. Counters
/// of batches, which no network needs, are left out.
pub fn from_braindecode(file: &mut TensorFile) {
    for name in names(file) {
        if name.ends_with(".num_batches_tracked") {
            let _ = file.take(&name);
            continue;
        }
        // The longer names first, of which the last is a part.
        let renamed = NAMES.iter().fold(name.clone(), |name, (theirs, ours)| name.replace(theirs, ours));
        // Before the classifier had a layer of its own, and the first convolutions theirs.
        let renamed = match renamed.split('.').next() {
            Some("conv_classifier") => format!("final_layer.{renamed}"),
            Some("conv_time" | "conv_spat") => format!("conv_time_spat.{renamed}"),
            Some("fc") => format!("final_layer.{renamed}"),
            _ => renamed,
        };
        file.rename(&name, renamed);
    }
}

/// The other way: names that `braindecode` loads, with weight norm in its new naming.
pub fn to_braindecode(file: &mut TensorFile) {
    for name in names(file) {
        let renamed = name
            .replace("temporal_blocks.", "temporal_blocks.temporal_block_")
            .replace(".weight_g", ".parametrizations.weight.original0")
            .replace(".weight_v", ".parametrizations.weight.original1")
            .replace("conv_spatial.weight", "conv_spatial.parametrizations.weight.original");
        file.rename(&name, renamed);
    }
}

fn names(file: &TensorFile) -> Vec<String> {
    file.names().map(str::to_string).collect()
}
