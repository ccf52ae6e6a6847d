//! Where the gradients of parameters are added up on the CPU.

use std::collections::HashMap;

/// Where gradients are summed: of trainable adapters, or of trainable weights.
#[derive(Debug)]
pub struct GradientBuffers<'a> {
    /// The first parameter of each adapted module, as `Adapter::places` has them.
    pub places: &'a HashMap<String, usize>,
    /// One vector per parameter.
    pub gradients: &'a mut [Vec<f32>],
}

impl GradientBuffers<'_> {
    /// The gradient of a module's first parameter, or of one after it.
    pub(super) fn of(&mut self, module: &str, next: usize) -> &mut [f32] {
        &mut self.gradients[self.places[module] + next]
    }
}
