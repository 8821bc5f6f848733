//! Images from every format, and broken files that are refused with their names.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::io::Write;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use kiln_core::{HostTensor, TensorFile};
use kiln_data::{ImageOptions, Images, write_npz};

fn read(path: &Path) -> kiln_core::Result<Images> {
    Images::read(path, &ImageOptions::default())
}

fn refusal(path: &Path) -> String {
    let error = read(path).unwrap_err();
    format!("{error}; {}", error.hint_text().unwrap_or("no hint"))
}

fn idx(extents: &[u32], bytes: &[u8]) -> Vec<u8> {
    let mut file = vec![0, 0, 8, extents.len() as u8];
    extents.iter().for_each(|extent| file.extend(extent.to_be_bytes()));
    file.extend(bytes);
    file
}

#[test]
fn idx_files_find_their_labels_gzipped_or_not() {
    let dir = tempfile::tempdir().unwrap();
    let images = idx(&[2, 1, 3], &[0, 255, 51, 102, 153, 204]);
    fs::write(dir.path().join("t-images-idx3-ubyte"), &images).unwrap();
    fs::write(dir.path().join("t-labels-idx1-ubyte"), idx(&[2], &[9, 3])).unwrap();
    let plain = read(&dir.path().join("t-images-idx3-ubyte")).unwrap();
    assert_eq!((plain.shape, plain.len()), ([1, 1, 3], 2));
    assert_eq!(plain.image(0), [0.0, 1.0, 0.2]);
    assert_eq!((plain.labels, plain.classes), (vec![1, 0], vec!["3".to_string(), "9".into()]));

    let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
    packed.write_all(&images).unwrap();
    fs::write(dir.path().join("u-images-idx3-ubyte.gz"), packed.finish().unwrap()).unwrap();
    assert!(refusal(&dir.path().join("u-images-idx3-ubyte.gz")).contains("--labels"));
    let options = ImageOptions { unlabelled: true, ..ImageOptions::default() };
    let unlabelled = Images::read(&dir.path().join("u-images-idx3-ubyte.gz"), &options).unwrap();
    assert!(unlabelled.labels.is_empty() && unlabelled.len() == 2);
}

#[test]
fn broken_idx_files_are_refused_without_allocating_what_they_claim() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x-images-idx3-ubyte");
    for (bytes, words) in [
        (vec![0, 0], "ends before its magic number"),
        (b"hello world".to_vec(), "begins with the bytes"),
        (idx(&[u32::MAX, u32::MAX, 9], &[]), "claims an extent"),
        (idx(&[2, 1, 3], &[1, 2, 3]), "should hold 6 bytes after its header but holds 3"),
        (idx(&[1, 1, 1], &[1, 2, 3]), "but holds more"),
        (idx(&[2], &[1, 2]), "has the extents [2]"),
    ] {
        fs::write(&path, bytes).unwrap();
        assert!(refusal(&path).contains(words), "{}", refusal(&path));
    }
}

#[test]
fn folders_are_classes_and_colour_shows_in_the_channels() {
    let dir = tempfile::tempdir().unwrap();
    for (class, grey) in [("ants", 0u8), ("bees", 255)] {
        fs::create_dir(dir.path().join(class)).unwrap();
        let image = image::GrayImage::from_pixel(3, 2, image::Luma([grey]));
        image.save(dir.path().join(class).join("1.png")).unwrap();
    }
    let grey = read(dir.path()).unwrap();
    assert_eq!((grey.shape, grey.labels.as_slice()), ([1, 2, 3], &[0, 1][..]));
    assert_eq!(grey.classes, ["ants", "bees"]);
    assert_eq!(grey.image(1), [1.0; 6]);

    let red = image::RgbImage::from_pixel(3, 2, image::Rgb([255, 0, 0]));
    red.save(dir.path().join("bees/2.jpg")).unwrap();
    let colour = read(dir.path()).unwrap();
    assert_eq!((colour.shape, colour.len()), ([3, 2, 3], 3));
    assert!(colour.image(2)[..6].iter().all(|&x| x > 0.95) && colour.image(2)[6..].iter().all(|&x| x < 0.05));

    // One file alone has no label.
    let one = dir.path().join("bees/1.png");
    let options = ImageOptions { unlabelled: true, ..ImageOptions::default() };
    let image = Images::read(&one, &options).unwrap();
    assert_eq!((image.len(), image.labels.len()), (1, 0));
    assert!(read(&one).is_err());
    image::GrayImage::new(4, 2).save(dir.path().join("bees/3.png")).unwrap();
    assert!(refusal(dir.path()).contains("3.png: is 4 x 2 pixels"), "{}", refusal(dir.path()));
    fs::write(dir.path().join("bees/3.png"), b"not an image").unwrap();
    assert!(refusal(dir.path()).contains("3.png"), "{}", refusal(dir.path()));
}

#[test]
fn rows_of_a_table_are_square_images_and_white_is_told_by_the_largest_value() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("digits.csv");
    fs::write(&path, "a,b,c,d,label\n0,4,8,16,seven\n1,1,1,1,two\n").unwrap();
    let images = read(&path).unwrap();
    assert_eq!((images.shape, images.white), ([1, 2, 2], 16.0));
    assert_eq!(images.image(0), [0.0, 0.25, 0.5, 1.0]);
    assert_eq!(images.select(&[1]).labels, [1]);
    let known = images.clone().with_classes(&["two".into(), "seven".into()], &path).unwrap();
    assert_eq!(known.labels, [1, 0]);
    let error = images.with_classes(&["two".into()], &path).unwrap_err().to_string();
    assert!(error.contains("image 1 has the label \"seven\""), "{error}");
    fs::write(&path, "a,b,label\n0,,x\n1,1,y\n").unwrap();
    assert!(refusal(&path).contains("row 1, column \"b\" is empty"), "{}", refusal(&path));
    fs::write(&path, "a,b,label\n0,1,x\n1,1,\n").unwrap();
    assert!(refusal(&path).contains("row 2 has no label"), "{}", refusal(&path));
}

#[test]
fn arrays_of_bytes_are_brightness_and_those_of_floats_stay() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("images.npz");
    let mut file = TensorFile::new();
    file.insert("x", HostTensor::int([2, 1, 2], vec![0, 51, 255, 0]));
    file.insert("y", HostTensor::int([2], vec![1, 0]));
    write_npz(&path, &file).unwrap();
    assert_eq!(read(&path).unwrap().image(0), [0.0, 0.2]);
    file.insert("x", HostTensor::float([2, 3, 1, 1], vec![0.5, f32::NAN, 0.0, 1.0, 1.0, 1.0]));
    write_npz(&path, &file).unwrap();
    assert!(refusal(&path).contains("image 1 has a pixel that is no number"));
    file.insert("x", HostTensor::float([4], vec![0.5; 4]));
    write_npz(&path, &file).unwrap();
    assert!(refusal(&path).contains("have the shape [4]"));
}

/// A `.npy` file of bytes, as `numpy.save` writes it.
fn npy(shape: &str, values: &[u8]) -> Vec<u8> {
    let header = format!("{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}");
    let header = format!("{header:<117}\n"); // 128 bytes with what comes before
    [&b"\x93NUMPY\x01\x00\x76\x00"[..], header.as_bytes(), values].concat()
}

#[test]
fn arrays_of_images_and_of_labels_are_read_from_a_file_each() {
    let dir = tempfile::tempdir().unwrap();
    let (path, labels) = (dir.path().join("x.npy"), dir.path().join("y.npy"));
    std::fs::write(&path, npy("(2, 1, 2)", &[0, 255, 51, 0])).unwrap();
    std::fs::write(&labels, npy("(2,)", &[7, 3])).unwrap();
    let options = ImageOptions { labels: Some(labels.clone()), ..ImageOptions::default() };
    let images = Images::read(&path, &options).unwrap();
    assert_eq!((images.shape, &images.pixels[..]), ([1, 1, 2], &[0.0, 1.0, 0.2, 0.0][..]));
    assert_eq!((&images.labels[..], &images.classes[..]), (&[1, 0][..], &["3".into(), "7".into()][..]));
    let error = Images::read(&path, &ImageOptions::default()).unwrap_err();
    assert!(error.to_string().contains("no labels") && error.hint_text().unwrap().contains(".npy"));
    let unlabelled = ImageOptions { unlabelled: true, ..ImageOptions::default() };
    assert!(Images::read(&path, &unlabelled).unwrap().labels.is_empty());
    std::fs::write(&labels, npy("(3,)", &[7, 3, 3])).unwrap();
    assert!(Images::read(&path, &options).unwrap_err().to_string().contains("3 labels for 2 images"));
}
