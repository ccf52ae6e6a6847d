//! What the units of a layer are computed with.

use crate::isa::Isa;
use crate::model::adapters::AdapterGroup;
use crate::model::config::Config;
use crate::model::layers::Layer;
use crate::model::pass::Pass;
use crate::ops::Precision;
use crate::ops::gemm::PanelType;

/// One layer of one pass.
pub(crate) struct LayerPass<'a> {
    pub(super) config: &'a Config,
    pub(super) layer: &'a Layer,
    pub(super) pass: &'a Pass<'a>,
    pub(super) isa: Isa,
    /// Panels of the products of the forward and of the backward pass.
    pub(super) forward: PanelType,
    pub(super) backward: PanelType,
    /// How exactly the tape keeps products.
    pub(super) kept_as: PanelType,
    pub(super) tokens: usize,
    /// The tokens of each list of adapters in a decode step: products then read each weight where it is,
    /// for a token a row. Training and prompts are computed one way, however many tokens there are.
    pub(super) adapter_groups: Option<&'a [AdapterGroup<'a>]>,
}

impl<'a> LayerPass<'a> {
    /// Prepares a layer for the pass.
    pub(crate) fn new(
        config: &'a Config,
        layer: &'a Layer,
        pass: &'a Pass<'a>,
        precision: Precision,
    ) -> Self {
        let (forward, backward) = precision.panels();
        let tokens = pass.segments.last().map_or(0, |segment| segment.tokens.end);
        let isa = Isa::current();
        let adapter_groups = None;
        // A model whose weights train keeps everything exactly.
        let trains = layer.attention.o.gradient().is_some();
        let kept_as = if trains { PanelType::F32 } else { forward };
        Self { config, layer, pass, isa, forward, backward, kept_as, tokens, adapter_groups }
    }

    /// The layer of a decode step, without gradients. `adapter_groups` are the pass's.
    pub(crate) fn decoding(self, adapter_groups: &'a [AdapterGroup<'a>]) -> Self {
        Self { adapter_groups: Some(adapter_groups), ..self }
    }
}
