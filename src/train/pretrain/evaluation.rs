//! Held-out text: the loss of the model, and of a bigram model to compare it with.

use serde_json::json;

use crate::data::Batch;
use crate::data::corpus::Corpus;
use crate::eval::{Bigram, TextLoss, text_loss};
use crate::model::full::FullModel;
use crate::monitor::Monitor;
use crate::train::TrainError;
use crate::train::metrics::Numbers;
use crate::train::settings::PretrainSettings;

/// Tokens per evaluation batch; at least one row.
const EVAL_TOKENS: usize = 2048;
/// Maximum number of tokens that the bigram baseline counts.
const BIGRAM_TOKENS: u64 = 1 << 22;

/// Bits per byte of the held-out rows, of all and of each source; `None` if the run was stopped
/// before all were evaluated.
pub(super) fn evaluate_held_out(
    model: &FullModel,
    corpus: &Corpus,
    settings: &PretrainSettings,
    monitor: Monitor<'_>,
) -> Result<Option<Numbers>, TrainError> {
    let decoder = model.decoder(settings.compute())?;
    let mut all = TextLoss::default();
    let mut of_sources = Vec::new();
    for (index, source) in corpus.sources().enumerate() {
        let batches = held_out(corpus, index, settings);
        let Some(loss) = text_loss(&decoder, batches, monitor.stop)? else { return Ok(None) };
        if loss.tokens > 0 {
            let key = format!("eval_{}_bits_per_byte", source.name);
            of_sources.push((key, json!(loss.bits_per_byte())));
        }
        all.add(&loss);
    }
    let mut numbers: Numbers = vec![
        ("eval_loss".into(), json!(all.loss())),
        ("eval_perplexity".into(), json!(all.loss().exp())),
        ("eval_bits_per_byte".into(), json!(all.bits_per_byte())),
    ];
    if of_sources.len() > 1 {
        numbers.extend(of_sources);
    }
    Ok(Some(numbers))
}

/// The held-out rows of a source for evaluations, in batches.
fn held_out(
    corpus: &Corpus,
    source: usize,
    settings: &PretrainSettings,
) -> impl Iterator<Item = (Batch, u64)> {
    let all = corpus.validation_rows(source);
    let rows = match settings.eval_rows as u64 {
        0 => all,
        rows => rows.min(all),
    };
    let at_once = (EVAL_TOKENS / settings.max_length).max(1);
    (0..rows).step_by(at_once).map(move |first| {
        let found = corpus.validation(source, first..rows.min(first + at_once as u64));
        (found.batch, found.bytes)
    })
}

/// Bits per byte of the held-out rows under a bigram model of the first rows of the run; `None`
/// without held-out rows.
pub(super) fn bigram_bits_per_byte(
    corpus: &Corpus,
    settings: &PretrainSettings,
    vocab_size: usize,
) -> Option<f64> {
    let mut bigram = Bigram::new(vocab_size);
    let length = settings.max_length as u64;
    let rows = BIGRAM_TOKENS / length;
    let rows = rows.min(settings.total_steps() * settings.rows_of_step());
    for row in 0..rows {
        bigram.learn(&corpus.batch(row..row + 1).tokens);
    }
    let mut sum = TextLoss::default();
    for source in 0..corpus.sources().len() {
        for (batch, bytes) in held_out(corpus, source, settings) {
            for &(row, token) in &batch.targets {
                sum.nats += bigram.nats(&[batch.tokens[row as usize], token]);
            }
            sum.tokens += batch.targets.len() as u64;
            sum.bytes += bytes;
        }
    }
    (sum.bytes > 0).then(|| sum.bits_per_byte())
}
