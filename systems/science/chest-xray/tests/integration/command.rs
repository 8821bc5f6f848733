//! The verbs of `kiln chest-xray`, with good and bad input.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;

use kiln_chest_xray::ChestXray;
use kiln_chest_xray::networks::{ClassifierConfig, Net};
use kiln_core::testing::Desk;
use kiln_core::{HostTensor, TensorFile};
use kiln_data::{Picture, read_npz};

/// A desk with forty phantoms.
fn desk() -> Desk {
    let desk = Desk::new(&ChestXray);
    desk.json("phantom --n 40 --shortcut 0.9 --size 64 --out @d");
    desk
}

const SEG: &str = "train-seg --images @d/images --masks @d/masks --width 2 --size 64 --epochs 2";
const TRAIN: &str = "train --images @d/images --net resnet18 --width 0.0625 --size 64 --epochs 1 --batch 8";

#[test]
fn lungs_are_found_and_images_judged_and_explained() {
    let desk = desk();
    let table = fs::read_to_string(desk.path("d/labels.csv")).unwrap();
    assert!(table.starts_with("image,label,patient,marker,signs\nNormal/ph00000.png,Normal,"), "{table}");

    let trained = desk.json(&format!("{SEG} --out @s"));
    assert!(trained["folds"][0]["dice"].as_f64().unwrap() > 0.0 && desk.path("s/loss.svg").exists());
    let modified = desk.json(&format!("{SEG} --net unet-modified --folds 2 --augment --out @s2"));
    assert_eq!(modified["folds"].as_array().unwrap().len(), 2);
    let found = desk.json("segment --model @s --images @d/images --crop --out @m");
    assert_eq!(found["images"].as_array().unwrap().len(), 40);
    let masks = Picture::read(&desk.path("m/masks/TB/ph00001.png")).unwrap();
    assert_eq!(masks.shape, [1, 64, 64]);
    assert!(
        desk.path("m/segmented/TB/ph00001.png").exists() && desk.path("m/outlines/TB/ph00001.png").exists()
    );
    let judged = desk.json("mask-eval --pred @m/masks --truth @d/masks --out @mask.json");
    assert!(judged["images"] == 40 && judged["dice"].as_f64().unwrap() <= 1.0);
    assert_eq!(judged["each"].as_array().unwrap().len(), 40);
    assert_eq!(desk.json("mask-eval --pred @d/masks --truth @d/masks")["dice"], 1.0);
    assert!(
        fs::read_to_string(desk.path("s/test.csv")).unwrap().starts_with("image,fold,dice,iou,accuracy\n")
    );

    let result = desk.json(&format!("{TRAIN} --folds 2 --seg @s --out @c"));
    assert!(result["metrics"]["n"] == 40 && result["segmented"] == true, "{result}");
    let rows = fs::read_to_string(desk.path("c/predictions.csv")).unwrap();
    assert!(rows.lines().count() == 41 && rows.starts_with("image,label,p_tb,fold\n"));
    assert!(desk.path("c/roc.svg").exists() && desk.path("c/metrics.json").exists());
    desk.json(&format!("{TRAIN} --folds 1 --class-weights --augment all --freeze until:layer4 --out @w"));

    let predicted = desk.json("predict --model @c @w --seg @s --images @d/images --overlays --out @p");
    assert_eq!(predicted["predictions"].as_array().unwrap().len(), 40);
    let rows = fs::read_to_string(desk.path("p/predictions.csv")).unwrap();
    assert!(rows.starts_with("image,p_tb,label,lung_fraction,warnings\n"), "{rows}");
    let page = fs::read_to_string(desk.path("p/worklist.html")).unwrap();
    assert!(page.contains("not a medical device") && page.contains("overlays/TB/ph00001.png"), "{page}");
    assert!(desk.path("p/overlays/TB/ph00001.png").exists());

    let judged = desk.json("eval --model @w --images @d/images --out @e.json");
    assert!(judged["n"] == 40 && judged["auc"].as_f64().is_some());
    let calibrated = desk.json("calibrate --model @w --images @d/images --out @cal");
    let brier = |when: &str| calibrated[when]["brier"].as_f64().unwrap();
    assert!(brier("after") <= brier("before") + 1e-3, "{calibrated}");
    assert!(desk.json("eval --model @cal --images @d/images --out @e2.json")["tp"].as_u64().unwrap() >= 18);

    let explained =
        desk.json("explain --model @c --seg @s --images @d/images --max-maps 4 --curves --out @x");
    assert_eq!(explained["images"].as_array().unwrap().len(), 40);
    // Two folds are explained together: with the probability that they vote for, and by the mean of their maps.
    let together = desk.json("predict --model @c --seg @s --images @d/images --out @both");
    for (image, predicted) in
        explained["images"].as_array().unwrap().iter().zip(together["predictions"].as_array().unwrap())
    {
        assert_eq!((&image["image"], &image["p_tb"]), (&predicted["image"], &predicted["p_tb"]));
        assert!((0.0..=1.0).contains(&image["lung_attention"].as_f64().unwrap()), "{image}");
    }
    assert_eq!(explained["lung_attention"][0]["n"], 40);
    assert!(desk.path("x/curves.svg").exists() && desk.path("x/overlays/Normal/ph00000.png").exists());
    desk.json("explain --model @w --images @d/images/TB --method grad-cam --class tb --out @g");
    let places = desk.json("explain --model @c @w --seg @s --images @d/images --method tsne --out @t");
    assert!(places["images"] == 40 && desk.path("t/tsne.svg").exists());
    let rows = fs::read_to_string(desk.path("t/tsne.csv")).unwrap();
    assert_eq!(rows.lines().count(), 41);

    let judged = desk.json("eval --model @c --seg @s --images @d/images --out @folds.json");
    assert!(
        judged["ci95"]["sensitivity"].as_f64().is_some()
            && judged["normal"]["specificity"] == judged["sensitivity"]
    );
    let curves = fs::read_to_string(desk.path("folds.roc.svg")).unwrap();
    assert!(curves.contains("fold-2") && curves.contains("all together"));
    desk.json(&format!("{TRAIN} --folds 1 --fit pad --out @pad"));
    desk.assert_refused("explain --model @w @pad --images @d/images --out @no", "different squares");
}

#[test]
fn what_cannot_be_used_is_refused_by_name() {
    let desk = desk();
    desk.json(&format!("{SEG} --out @s"));
    desk.json(&format!("{TRAIN} --folds 1 --out @w"));
    desk.json(&format!("{TRAIN} --folds 1 --seg @s --out @l"));

    desk.assert_refused("predict --model @l --images @d/images --out @p", "with --seg");
    desk.assert_refused(
        "predict --model @s --images @d/images --out @p",
        "finds lungs and does not classify",
    );
    desk.assert_refused(
        "segment --model @w --images @d/images --out @p",
        "classifies and does not find lungs",
    );
    desk.assert_refused("predict --model @none --images @d/images --out @p", "neither a model nor the folds");
    desk.assert_refused(&format!("{TRAIN} --folds 1 --out @w"), "already holds a training run");
    desk.assert_refused(&format!("{TRAIN} --crop --out @y"), "only --seg finds");
    desk.assert_refused(&format!("{TRAIN} --folds 20 --out @y"), "40 images cannot be divided into 20 folds");
    desk.assert_refused(&format!("{TRAIN} --freeze until:layer9 --out @y"), "no parameter begins with");
    desk.assert_refused("train --images @d/images/TB --net resnet18 --out @y", "has no label");
    desk.assert_refused("phantom --n 0 --out @y", "--n 0");
    desk.assert_refused("phantom --n 1 --shortcut 2 --out @y", "--shortcut 2");
    assert!(!desk.path("p").exists() && !desk.path("y").exists());

    // Images that are none, or not whole, or of another kind.
    fs::create_dir(desk.path("odd")).unwrap();
    let whole = fs::read(desk.path("d/images/TB/ph00001.png")).unwrap();
    desk.write("odd/cut.png", &whole[..whole.len() / 2]);
    desk.write("odd/text.png", "no image");
    desk.write("odd/scan.dcm", "no image either");
    let colours = (0..3 * 64 * 64).map(|i| f32::from(u8::from(i < 64 * 64))).collect();
    Picture { shape: [3, 64, 64], pixels: colours }.write_png(&desk.path("odd/photo.png")).unwrap();
    let found = desk.json("predict --model @w --seg @s --images @odd --out @p");
    let row = |name: &str| {
        let rows = found["predictions"].as_array().unwrap();
        rows.iter().find(|row| row["image"] == name).unwrap_or_else(|| panic!("{found}")).clone()
    };
    assert!(row("cut.png")["label"] == "unreadable" && row("text.png")["label"] == "unreadable");
    assert!(row("scan.dcm")["warnings"].as_str().unwrap().contains("no DICM"));
    assert!(row("photo.png")["warnings"].as_str().unwrap().contains("colours"));
    fs::remove_file(desk.path("odd/photo.png")).unwrap();
    desk.assert_refused("predict --model @w --images @odd --out @p3", "none of the images can be read");
    desk.assert_refused("segment --model @s --images @odd --out @p3", "cut.png");

    // A mask of another size, and one that is missing.
    fs::create_dir(desk.path("masks")).unwrap();
    for entry in fs::read_dir(desk.path("d/masks")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, desk.path("masks").join(path.file_name().unwrap())).unwrap();
    }
    Picture::grey(8, 8, vec![1.0; 64]).write_png(&desk.path("masks/ph00003.png")).unwrap();
    let line = "train-seg --images @d/images --masks @masks --width 2 --size 64 --out @z";
    desk.assert_refused(line, "ph00003.png: is 8 x 8 pixels");
    fs::remove_file(desk.path("masks/ph00003.png")).unwrap();
    desk.assert_refused(line, "holds no mask for");
    desk.assert_refused(&line.replace("--size 64", "--size 60"), "divisible by 16");
    assert!(!desk.path("z").exists());

    // Tables.
    desk.write("l.csv", "image,label\nTB/ph00001.png,perhaps\n");
    desk.assert_refused(
        "train --images @d/images --labels @l.csv --out @y",
        "row 1: the label is \"perhaps\"",
    );
    desk.write("l.csv", "image,label\nTB/none.png,TB\n");
    desk.assert_refused("train --images @d/images --labels @l.csv --out @y", "row 1: there is no");
    desk.write("s.csv", "image,label,p_tb\na,TB,1.5\n");
    desk.assert_refused("eval --scores @s.csv --out @e.json", "row 1: p_tb is \"1.5\"");
    desk.write("s.csv", "image,p_tb\na,0.5\n");
    desk.assert_refused("eval --scores @s.csv --out @e.json", "expected image, label and p_tb");
    assert!(!desk.path("e.json").exists());
}

#[test]
fn copies_are_found_and_kept_in_one_fold() {
    let desk = desk();
    fs::copy(desk.path("d/images/TB/ph00001.png"), desk.path("d/images/TB/copy.png")).unwrap();
    let found = desk.json("duplicates --images @d/images --out @dup.csv");
    assert_eq!((found["images"].as_u64(), found["copies"].as_u64()), (Some(41), Some(1)), "{found}");
    desk.json(&format!("{TRAIN} --folds 2 --patient-regex (ph[0-9]+|copy) --out @c"));
    let rows = fs::read_to_string(desk.path("c/predictions.csv")).unwrap();
    let fold = |name: &str| {
        rows.lines().find(|row| row.starts_with(name)).unwrap().rsplit(',').next().unwrap().to_string()
    };
    assert_eq!(fold("TB/ph00001.png"), fold("TB/copy.png"));
    // The same pixels with another label.
    fs::copy(desk.path("d/images/TB/ph00001.png"), desk.path("d/images/Normal/copy.png")).unwrap();
    desk.assert_refused(&format!("{TRAIN} --folds 2 --out @c2"), "different labels");
}

#[test]
fn weights_of_torchvision_are_loaded_to_the_last_name() {
    let desk = desk();
    let config = ClassifierConfig { width: 0.125, ..ClassifierConfig::new(Net::Chexnet, 14) };
    let mut file = TensorFile::from_module(&config.init(&desk.cx.device));
    // As CheXNet was published: parallel training, the old names of dense layers, and a sigmoid behind the classifier.
    for name in file.names().map(str::to_string).collect::<Vec<_>>() {
        let renamed = kiln_chest_xray::networks::torchvision_name(&name);
        let old = ["norm1", "norm2", "conv1", "conv2"].iter().fold(renamed.clone(), |name, part| {
            let dotted = format!("{}.{}", &part[..4], &part[4..]);
            if name.contains("denselayer") {
                name.replace(&format!(".{part}."), &format!(".{dotted}."))
            } else {
                name
            }
        });
        let old = old.replace("classifier.", "classifier.0.");
        file.rename(&name, format!("module.{old}"));
    }
    file.insert("module.features.norm0.num_batches_tracked", HostTensor::int([1], vec![3]));
    file.write(&desk.path("chexnet.safetensors")).unwrap();
    let line =
        "train --images @d/images --net chexnet --width 0.125 --size 64 --epochs 1 --batch 8 --folds 1";
    desk.json(&format!("{line} --weights @chexnet.safetensors --freeze backbone --lr 1e-2 --out @c"));
    // What was frozen is as it was.
    let learnt = TensorFile::read(&desk.path("c/model.safetensors")).unwrap();
    let name = "features.denseblock3.denselayer.4.conv2.weight";
    let first = file.get("module.features.denseblock3.denselayer5.conv.2.weight").unwrap();
    assert_eq!(learnt.get(name).unwrap(), first);
    assert_eq!(learnt.get("classifier.weight").unwrap().shape[0], 2);
    let config = fs::read_to_string(desk.path("c/config.json")).unwrap();
    assert!(config.contains("\"imagenet\""), "{config}");

    desk.assert_refused(&format!("{line} --weights @none.safetensors --out @x"), "none.safetensors");
    let pickled = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../crates/data/tests/data/checkpoint.pth");
    fs::copy(pickled, desk.path("other.pth")).unwrap();
    desk.assert_refused(&format!("{line} --weights @other.pth --out @x"), "\"conv.bias\" has no place");
    file.rename("module.features.norm0.weight", "module.features.norm9.weight");
    file.write(&desk.path("bad.safetensors")).unwrap();
    desk.assert_refused(&format!("{line} --weights @bad.safetensors --out @x"), "features.norm9.weight");
    assert!(!desk.path("x").exists());
}

#[test]
fn backbone_and_classifier_move_by_learning_rates_of_their_own() {
    let desk = desk();
    // The first step of Adam moves every number by the learning rate, unless its gradient is nearly 0.
    for net in ["resnet18", "vgg19", "mobilenet"] {
        let line = format!(
            "train --images @d/images --net {net} --width 0.0625 --size 64 --epochs 1 --batch 99 --folds 1"
        );
        desk.json(&format!("{line} --lr 1e-9 --out @{net}-still"));
        let head_lr = "--lr 1e-3 --head-lr 2e-2";
        desk.json(&format!(
            "{line} {head_lr} --weights @{net}-still/model.safetensors --norm zscore --out @{net}"
        ));
        let weights = |folder: &str| TensorFile::read(&desk.path(folder).join("model.safetensors")).unwrap();
        let (before, after) = (weights(&format!("{net}-still")), weights(net));
        let heads = match net {
            "resnet18" => "fc.",
            "vgg19" => "classifier.6.",
            _ => "classifier.1.",
        };
        let mut moved = [0.0f32; 2];
        for name in before.names().filter(|name| !name.contains("running")) {
            let pairs = before
                .get(name)
                .unwrap()
                .as_floats()
                .unwrap()
                .iter()
                .zip(after.get(name).unwrap().as_floats().unwrap());
            let most = &mut moved[usize::from(name.starts_with(heads))];
            *most = pairs.map(|(a, b)| (a - b).abs()).fold(*most, f32::max);
        }
        assert!((moved[0] - 1e-3).abs() < 1e-5 && (moved[1] - 2e-2).abs() < 1e-4, "{net}: {moved:?}");
    }
    desk.assert_refused(&format!("{TRAIN} --head-lr 0 --out @x"), "--head-lr 0");
}

#[test]
fn every_network_learns_and_is_explained() {
    let desk = Desk::new(&ChestXray);
    desk.json("phantom --n 26 --size 96 --out @d");
    for net in Net::PAPER.into_iter().chain([Net::Squeezenet11]).map(Net::name) {
        let line = format!(
            "train --images @d/images --net {net} --width 0.0625 --size 96 --folds 1 --epochs 1 --batch 8"
        );
        desk.json(&format!("{line} --out @{net}"));
        for layer in ["last", "middle"] {
            let out = format!("@{net}-{layer}");
            let one = "--images @d/images/TB/ph00001.png --max-maps 2";
            desk.json(&format!("explain --model @{net} {one} --layer {layer} --out {out}"));
            assert!(desk.path(&format!("{net}-{layer}/overlays/ph00001.png")).exists(), "{net}");
        }
    }
}

/// A DICOM file of bytes whose window shows them as they are.
fn dicom(rows: u16, columns: u16, pixels: &[u8]) -> Vec<u8> {
    let mut file = [&[0; 128][..], b"DICM"].concat();
    let mut put = |group: u16, number: u16, kind: &[u8; 2], value: &[u8]| {
        file.extend([group.to_le_bytes(), number.to_le_bytes(), *kind].concat());
        match kind {
            b"OW" => file.extend([&[0; 2][..], &(value.len() as u32).to_le_bytes()].concat()),
            _ => file.extend((value.len() as u16).to_le_bytes()),
        }
        file.extend(value);
    };
    put(0x0002, 0x0010, b"UI", b"1.2.840.10008.1.2.1\0");
    put(0x0010, 0x0020, b"LO", b"ph1 ");
    put(0x0028, 0x0002, b"US", &1u16.to_le_bytes());
    put(0x0028, 0x0004, b"CS", b"MONOCHROME2 ");
    put(0x0028, 0x0010, b"US", &rows.to_le_bytes());
    put(0x0028, 0x0011, b"US", &columns.to_le_bytes());
    put(0x0028, 0x0100, b"US", &8u16.to_le_bytes());
    put(0x0028, 0x1050, b"DS", b"128 ");
    put(0x0028, 0x1051, b"DS", b"256 ");
    put(0x7FE0, 0x0010, b"OW", pixels);
    file
}

#[test]
fn the_same_pixels_give_the_same_prediction_from_dicom_and_png() {
    let desk = desk();
    desk.json(&format!("{TRAIN} --folds 1 --out @w"));
    let picture = Picture::read(&desk.path("d/images/TB/ph00001.png")).unwrap();
    fs::create_dir(desk.path("two")).unwrap();
    picture.write_png(&desk.path("two/a.png")).unwrap();
    let bytes: Vec<u8> = picture.pixels.iter().map(|&x| (x * 255.0).round() as u8).collect();
    desk.write("two/b.dcm", dicom(64, 64, &bytes));
    let found = desk.json("predict --model @w --images @two --out @p");
    let p = |index: usize| found["predictions"][index]["p_tb"].as_f64().unwrap();
    assert!((p(0) - p(1)).abs() < 1e-6, "{found}");
    assert_eq!(desk.json("duplicates --images @two --out @dup.csv")["copies"], 1);
    // As arrays for other programs, with labels where there are some.
    let array = |images: &str| {
        desk.json(&format!("arrays --model @w --images @{images} --out @xy.npz"));
        read_npz(&desk.path("xy.npz")).unwrap()
    };
    assert!(array("two").get("y").is_none());
    let labelled = array("d/images");
    assert_eq!(labelled.get("x").unwrap().shape, [40, 3, 64, 64]);
    let y = labelled.get("y").unwrap().as_ints().unwrap().to_vec();
    assert_eq!(y, [[0; 20], [1; 20]].concat());
}

#[test]
fn png_files_of_every_kind_are_read_alike() {
    let desk = desk();
    desk.json(&format!("{TRAIN} --folds 1 --out @w"));
    let grey = image::open(desk.path("d/images/TB/ph00001.png")).unwrap().to_luma8();
    fs::create_dir(desk.path("kinds")).unwrap();
    let place = |name: &str| desk.path(&format!("kinds/{name}.png"));
    grey.save(place("grey")).unwrap();
    image::DynamicImage::from(grey.clone()).to_rgba8().save(place("rgba")).unwrap();
    image::DynamicImage::from(grey.clone()).to_luma16().save(place("deep")).unwrap();
    // A palette from bright to dark.
    let mut encoder =
        png::Encoder::new(fs::File::create(place("palette")).unwrap(), grey.width(), grey.height());
    encoder.set_color(png::ColorType::Indexed);
    encoder.set_palette((0..=255u8).rev().flat_map(|x| [x; 3]).collect::<Vec<_>>());
    let places: Vec<u8> = grey.iter().map(|&x| 255 - x).collect();
    encoder.write_header().unwrap().write_image_data(&places).unwrap();
    let found = desk.json("predict --model @w --images @kinds --out @p");
    let rows = found["predictions"].as_array().unwrap();
    assert_eq!(rows.len(), 4);
    for row in rows {
        let off = row["p_tb"].as_f64().unwrap() - rows[0]["p_tb"].as_f64().unwrap();
        assert!(off.abs() < 1e-5 && row["warnings"] == "", "{row}");
    }
}
