//! One micro-batch, the same for every objective: *up* through the layers, *read* the head,
//! *judge*, and *down* again layer by layer.
//!
//! With `recompute` each layer keeps only its input on the way up and rebuilds its tape on the
//! way down, so that memory is the inputs of all layers and the tape of one. Without, all tapes
//! stay until they are used. Nothing below the lowest trainable layer gets a gradient.

use std::sync::Arc;

use candle_core::{Result, Tensor, Var};
use quantune_adapters::delta::{Dropout, TokenKey};

use crate::data::Batch;
use crate::model::{Adapters, Decoder, Rows, Worn};
use crate::objectives::Objective;
use crate::optim::Gradients;

/// What a micro-batch is taken with.
#[derive(Debug)]
pub struct StepSettings<'a> {
    /// What is minimized.
    pub objective: Objective,
    /// What the sum of losses is multiplied with: 1 / the count of the whole step.
    pub scale: f64,
    /// Whether layers are recomputed on the way down.
    pub recompute: bool,
    /// The adapters of every row, one of them trainable.
    pub worn: &'a [Worn],
    /// The trainable parameters, in the order of the gradients.
    pub parameters: &'a [Var],
    /// Dropout before A of the trainable adapter.
    pub dropout: Option<&'a Dropout>,
}

/// Adds the gradients of a micro-batch to `gradients` and returns its summed loss (unscaled).
pub fn accumulate(
    decoder: &Decoder,
    batch: &Batch,
    settings: &StepSettings,
    gradients: &mut Gradients,
) -> Result<f64> {
    if batch.count() == 0 {
        return Ok(0.0);
    }
    let rows = Rows {
        tokens: batch.tokens.clone(),
        positions: batch.positions.clone(),
        segments: batch.segments.clone().into(),
    };
    let adapters = Adapters::Same(settings.worn);
    let pass = decoder.pass(&rows, adapters, settings.dropout);
    let layers = decoder.config.num_hidden_layers;
    let lowest = decoder.lowest_trainable(adapters).unwrap_or(layers);

    // Up.
    let mut x = decoder.embed(&rows.tokens)?; // (N, H)
    let mut kept = Vec::new();
    for index in 0..layers {
        if index < lowest {
            x = decoder.layer(index, &x, &pass)?;
            continue;
        }
        // The lowest layer's input needs no gradient, and as a plain tensor asks for none.
        let input = if index == lowest { x } else { Var::from_tensor(&x)?.into_inner() };
        let output = decoder.layer(index, &input, &pass)?;
        x = output.detach();
        kept.push((index, input, (!settings.recompute).then_some(output)));
    }

    // Read and judge.
    let top = Var::from_tensor(&x)?;
    drop(x);
    let (positions, targets): (Vec<u32>, Vec<u32>) = batch.targets.iter().copied().unzip();
    let positions = Tensor::new(positions, top.device())?;
    let read = decoder.final_norm(&top.as_tensor().index_select(&positions, 0)?)?; // (M, H)
    let logps = decoder.log_probs(&read, &targets)?; // (M)
    let sum = settings.objective.sum(&logps)?;
    let mut store = (&sum * settings.scale)?.backward()?;
    let mut dx = store.remove(&top);
    // The tape adds up in f32; what is reported is the sum of the same terms in f64.
    let loss = match settings.objective {
        Objective::LanguageModelling => {
            -logps.to_vec1::<f32>()?.iter().map(|&logp| f64::from(logp)).sum::<f64>()
        }
    };
    drop((logps, sum, read, store, top));

    // Down.
    while let Some((index, input, output)) = kept.pop() {
        let Some(dy) = dx else { break };
        let output = match output {
            Some(output) => output,
            None => decoder.layer(index, &input, &pass)?,
        };
        let mut store = (output * dy)?.sum_all()?.backward()?;
        dx = store.remove(&input);
        for (parameter, gradient) in settings.parameters.iter().zip(gradients.iter_mut()) {
            if let Some(added) = store.remove(parameter) {
                let added = added.flatten_all()?.to_vec1::<f32>()?;
                for (sum, value) in gradient.iter_mut().zip(added) {
                    *sum += value;
                }
            }
        }
    }
    Ok(loss)
}

/// Dropout whose masks belong to the tokens of `batch`, wherever they stand in it.
pub fn dropout(batch: &Batch, epoch: u64, p: f64, seed: u64) -> Option<Dropout> {
    if p == 0.0 {
        return None;
    }
    let key = |&(row, position): &(u64, u32)| TokenKey { epoch, row, position: position.into() };
    Some(Dropout { p, seed, keys: Arc::new(batch.keys.iter().map(key).collect()) })
}
