//! ptq
pub mod arch;
pub mod arrays;
pub mod checkpoint;
pub mod fold;
pub mod mlp;
pub mod quantiser;
pub mod search;

#[cfg(test)]
mod probe {
    use super::*;
    #[test]
    fn show() {
        use arch::*;
        for (arch, input) in [
            (Arch::Resnet, Input::Image([1, 8, 8])),
            (Arch::Mobilenet, Input::Image([1, 8, 8])),
            (Arch::Bert, Input::Text { vocabulary: 50, length: 6 }),
        ] {
            let c = ClassifierConfig { width: 0.25, ..ClassifierConfig::new(arch, input, 3) };
            let net = c.init(&burn::tensor::Device::flex());
            let mut g = kiln_compiler::capture(Box::new(checkpoint::Trained::new(c, net))).unwrap();
            for p in kiln_compiler::GraphPass::ALL {
                p.apply(&mut g).unwrap();
            }
            println!("{}", g.to_text().unwrap());
        }
    }
}
