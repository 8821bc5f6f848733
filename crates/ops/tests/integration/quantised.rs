//! Products of bytes are exact, whatever the instructions and the shape.

use kiln_ops::quantised::{
    Affine, Bytes, Conv, ConvShape, Ends, Level, Panels, Product, Requantise, pack_nibbles, round_even,
    unpack_nibbles,
};
use rand::RngExt;

use crate::support::rng;

/// The definition.
fn product(a: &[i32], b: &[i8], inner: usize, columns: usize) -> Vec<i32> {
    let row = |row: &[i32]| -> Vec<i32> {
        let column = |c: usize| (0..inner).map(|k| row[k] * i32::from(b[c * inner + k])).sum();
        (0..columns).map(column).collect()
    };
    a.chunks(inner).flat_map(row).collect()
}

#[test]
fn products_are_exact_on_every_level_for_odd_shapes() {
    let mut rng = rng(1);
    for (rows, inner, columns) in
        [(1, 1, 1), (5, 19, 6), (13, 64, 33), (27, 7, 130), (3, 300, 70), (61, 130, 48)]
    {
        for zero in [0u8, 7, 255] {
            let a: Vec<u8> = (0..rows * inner).map(|_| rng.random()).collect();
            let b: Vec<i8> = (0..columns * inner).map(|_| rng.random()).collect();
            let small: Vec<i8> = b.iter().map(|b| b >> 4).collect();
            let centred: Vec<i32> = a.iter().map(|&a| i32::from(a) - i32::from(zero)).collect();
            let bytes = Bytes::unsigned(&a, inner, zero);
            for level in Level::available() {
                let panels = Panels::from_rows(&b, columns, inner);
                let sums = Product::new(&bytes, &panels).with_level(level).sums();
                assert_eq!(sums, product(&centred, &b, inner, columns), "{level:?} {rows} {inner} {columns}");
                let nibbles = Panels::from_rows(&small, columns, inner).with_nibbles();
                let sums = Product::new(&bytes, &nibbles).with_level(level).sums();
                assert_eq!(sums, product(&centred, &small, inner, columns), "{level:?}, four bits");
            }
        }
    }
}

#[test]
fn the_largest_sums_do_not_saturate() {
    let inner = 4096;
    for weight in [127i8, -128] {
        let bytes = Bytes::unsigned(&vec![255; 13 * inner], inner, 0);
        let panels = Panels::from_rows(&vec![weight; 17 * inner], 17, inner);
        let expected = 255 * i32::from(weight) * inner as i32;
        for level in Level::available() {
            let sums = Product::new(&bytes, &panels).with_level(level).sums();
            assert!(sums.iter().all(|&sum| sum == expected), "{level:?}");
        }
    }
}

#[test]
fn signed_rows_and_transposed_weights_mean_the_same() {
    let mut rng = rng(2);
    let (rows, inner, columns) = (7, 21, 18);
    let a: Vec<i8> = (0..rows * inner).map(|_| rng.random()).collect();
    let b: Vec<i8> = (0..inner * columns).map(|_| rng.random()).collect();
    let turned: Vec<i8> = (0..columns * inner).map(|i| b[i % inner * columns + i / inner]).collect();
    let wide: Vec<i32> = a.iter().map(|&a| a.into()).collect();
    let (bytes, panels) = (Bytes::signed(&a, inner), Panels::from_columns(&b, inner, columns));
    assert_eq!(panels, Panels::from_rows(&turned, columns, inner));
    assert_eq!(Product::new(&bytes, &panels).sums(), product(&wide, &turned, inner, columns));
}

#[test]
fn large_products_are_shared_among_threads_without_a_difference() {
    let mut rng = rng(3);
    for (rows, inner, columns) in [(200, 130, 100), (3, 700, 1000)] {
        let a: Vec<u8> = (0..rows * inner).map(|_| rng.random()).collect();
        let b: Vec<i8> = (0..columns * inner).map(|_| rng.random()).collect();
        let (bytes, panels) = (Bytes::unsigned(&a, inner, 9), Panels::from_rows(&b, columns, inner));
        let centred: Vec<i32> = a.iter().map(|&a| i32::from(a) - 9).collect();
        assert_eq!(Product::new(&bytes, &panels).sums(), product(&centred, &b, inner, columns));
    }
}

/// The definition.
fn convolve(shape: &ConvShape, x: &[u8], w: &[i8], zero: u8) -> Vec<i32> {
    let [height, width] = shape.output();
    let (channels, outputs) = (shape.channels / shape.groups, shape.outputs / shape.groups);
    let mut out = Vec::new();
    for x in x.chunks(shape.channels * shape.image[0] * shape.image[1]) {
        for o in 0..shape.outputs {
            for at in 0..height * width {
                let mut sum = 0;
                for i in 0..channels * shape.kernel[0] * shape.kernel[1] {
                    let (c, tap) =
                        (i / (shape.kernel[0] * shape.kernel[1]), i % (shape.kernel[0] * shape.kernel[1]));
                    let y = at / width * shape.stride[0] + tap / shape.kernel[1] * shape.dilation[0];
                    let z = at % width * shape.stride[1] + tap % shape.kernel[1] * shape.dilation[1];
                    let inside = |at: usize, axis: usize| {
                        at.checked_sub(shape.padding[axis]).filter(|&at| at < shape.image[axis])
                    };
                    if let (Some(y), Some(z)) = (inside(y, 0), inside(z, 1)) {
                        let channel = o / outputs * channels + c;
                        let value = x[(channel * shape.image[0] + y) * shape.image[1] + z];
                        let weight = w[o * channels * shape.kernel[0] * shape.kernel[1] + i];
                        sum += (i32::from(value) - i32::from(zero)) * i32::from(weight);
                    }
                }
                out.push(sum);
            }
        }
    }
    out
}

#[test]
fn convolutions_are_exact_on_every_level() {
    let mut rng = rng(4);
    let shape = |channels, outputs, groups, kernel, stride, padding, dilation| ConvShape {
        channels,
        image: [9, 11],
        outputs,
        kernel,
        stride,
        padding,
        dilation,
        groups,
    };
    let shapes = [
        shape(3, 5, 1, [3, 3], [1, 1], [1, 1], [1, 1]),
        shape(6, 33, 1, [1, 1], [1, 1], [0, 0], [1, 1]),
        shape(6, 4, 1, [1, 1], [2, 2], [0, 0], [1, 1]),
        shape(4, 6, 2, [3, 2], [2, 1], [1, 0], [1, 1]),
        shape(5, 5, 5, [3, 3], [1, 1], [1, 1], [1, 1]),
        shape(5, 5, 5, [3, 3], [2, 2], [1, 1], [1, 1]),
        shape(2, 2, 2, [5, 5], [1, 1], [4, 4], [2, 2]),
        shape(2, 3, 1, [3, 3], [1, 2], [2, 2], [2, 2]),
    ];
    for shape in shapes {
        let x: Vec<u8> = (0..2 * shape.channels * 99).map(|_| rng.random()).collect();
        let count = shape.outputs * shape.channels / shape.groups * shape.kernel[0] * shape.kernel[1];
        let w: Vec<i8> = (0..count).map(|_| rng.random()).collect();
        for zero in [0, 113] {
            for level in Level::available() {
                let sums = Conv::new(shape, &w).with_level(level).sums(&x, zero);
                assert_eq!(sums, convolve(&shape, &x, &w, zero), "{level:?} {shape:?}");
            }
        }
    }
}

#[test]
fn results_are_scaled_cut_off_and_rounded_to_even() {
    let bytes = Bytes::unsigned(&[10, 20, 30], 1, 10);
    let panels = Panels::from_rows(&[1, -2], 2, 1);
    let product = Product::new(&bytes, &panels);
    let requantise = Requantise { scales: &[0.05, 0.5], bias: &[0, 1], ends: Ends { least: 0.0, most: 6.0 } };
    assert_eq!(product.floats(&requantise), [0.0, 0.5, 0.5, 0.0, 1.0, 0.0]);
    let to = Affine { scale: 0.2, zero: 3, most: 255 };
    // 0.5 / 0.2 is 2.5 and goes to 2.
    assert_eq!(product.bytes(&requantise, &to), [3, 5, 5, 3, 8, 3]);
    assert_eq!([0.5, 1.5, -0.5, -1.5, 2.4].map(round_even), [0.0, 2.0, 0.0, -2.0, 2.0]);
}

#[test]
fn nibbles_pack_low_half_first_and_an_odd_tail_alone() {
    let values = [1, -8, 7, -1, 0, 3];
    let packed = pack_nibbles(&values, 3);
    assert_eq!(packed, [0x81, 0x07, 0x0f, 0x03]);
    assert_eq!(unpack_nibbles(&packed, 3), values);
}
