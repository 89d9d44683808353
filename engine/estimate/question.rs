//! Plans for a model that need not exist, on a machine that need not be here: the search of runs, over
//! numbers that are estimated where a run measures them: the model's own tensors and its computing time, see
//! [`ModelShape`].

use crate::error::{Error, Result, internal};
use crate::estimate::model_shape::{ModelShape, Speeds};
use crate::planner::machine::Machine;
use crate::planner::observed::{KeptGraph, Observed};
use crate::planner::optimizer::AdamW;
use crate::planner::plan::{Bytes, Choices, Limits, Plan};
use crate::planner::search::Search;
use crate::planner::simulator::{Compute, Forecast};
use crate::schedule::buffer_plan::{Depths, DeviceKind};
use crate::schedule::layout::{DEFAULT_PIECE_BYTES, check_piece};
use crate::schedule::operation::Stream;
use candle_core::DType;
use ferrozero_kernels::ops::Products;
use ferrozero_offload::Tier;
use std::sync::Arc;

/// Memory of a device that its driver and libraries take: CUDA's context and the workspace of its matrix
/// products.
const DEVICE_RESERVE_BYTES: u64 = 1 << 30;

/// A model, a step and a machine.
#[derive(Debug, Clone)]
pub struct Question {
    /// The model.
    pub shape: ModelShape,
    /// Sequences of a micro-batch.
    pub batch: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Micro-batches of a step.
    pub accumulate: usize,
    /// Whether the norm of all gradients is clipped, so that it is needed before any update.
    pub clip: bool,
    /// Whether states are on disk once and not twice.
    pub in_place: bool,
    /// Ranks that share the states. The answer is for one of them, and the machine is what one of them has.
    pub ranks: usize,
    /// The machine.
    pub machine: Machine,
    /// What matrices are multiplied as on a machine that computes on its processors.
    pub products: Products,
    /// What is fixed.
    pub choices: Choices,
}

/// The best plan that was found.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Homes, buffers and bytes.
    pub plan: Plan,
    /// Time.
    pub forecast: Forecast,
    /// Home of boundary activations.
    pub boundaries: Tier,
    /// Slots, pieces and micro-batches that run vertically.
    pub depths: Depths,
    /// Bytes of files.
    pub disk_bytes: u64,
    /// Tokens a second.
    pub tokens_per_s: f64,
    /// Plans that were costed.
    pub costed: usize,
}

impl Question {
    fn device(&self) -> DeviceKind {
        let apart = self.machine.is_apart();
        DeviceKind { dtype: if apart { DType::BF16 } else { DType::F32 }, apart }
    }

    fn limits(&self) -> Limits {
        let reserve = if self.machine.is_apart() { DEVICE_RESERVE_BYTES } else { 0 };
        Limits {
            memory_bytes: self.machine.host_memory_bytes,
            device_bytes: self.machine.device_memory_bytes.map(|bytes| bytes.saturating_sub(reserve)),
            choices: self.choices.clone(),
            device: self.device(),
        }
    }

    fn tokens(&self) -> usize {
        self.batch * self.sequence
    }

    fn has_disk(&self) -> bool {
        self.machine.disk_bytes != Some(0)
    }

    /// What a rehearsal would find out.
    fn observed(&self, boundaries: Tier, compute: &Compute) -> Observed {
        let element_bytes = self.device().element_bytes() as usize;
        let calls = self.shape.calls(self.tokens(), element_bytes);
        let kept: u64 = calls.iter().map(|call| 4 * call.boundary_elements as u64).sum();
        let kept = if boundaries == Tier::Device { kept } else { 0 };
        // On a device of its own the cross-entropy is composed of candle's operations, which have all logits.
        let logits = self.machine.is_apart();
        let own = self.shape.working_bytes(self.tokens(), element_bytes, logits);
        let parked = self.shape.parked_bytes(self.tokens(), element_bytes, logits);
        let graphs = self.shape.kept_bytes(self.tokens(), element_bytes).into_iter();
        Observed {
            kept: graphs.map(|bytes| KeptGraph { bytes, beyond_bytes: 0 }).collect(),
            calls,
            working_bytes: Some(kept + own),
            parked_bytes: kept + parked,
            compute: compute.clone(),
        }
    }

    fn boundary_homes(&self) -> Vec<Tier> {
        if let Some(tier) = self.choices.boundaries {
            return vec![tier];
        }
        // Without a device of its own the host's memory is where boundaries are anyway.
        let host = self.machine.is_apart().then_some(Tier::Host);
        let disk = self.has_disk().then_some(Tier::Disk);
        [Some(Tier::Device), host, disk].into_iter().flatten().collect()
    }

    fn search<T>(&self, compute: &Compute, search: impl FnOnce(&Search) -> Result<T>) -> Result<T> {
        let homes = self.boundary_homes().into_iter();
        check_piece(self.choices.piece_bytes)?;
        let piece_bytes = self.choices.piece_bytes.unwrap_or(DEFAULT_PIECE_BYTES);
        search(&Search {
            layout: Arc::new(self.shape.layout(piece_bytes / 4, self.ranks)),
            limits: self.limits(),
            adamw: AdamW::default(),
            accumulate: self.accumulate,
            clip: self.clip.then_some(1.0),
            has_disk: self.has_disk(),
            ranks: self.ranks,
            observed: homes.map(|home| (home, self.observed(home, compute))).collect(),
            check: &|plan| self.check_disk(plan),
        })
    }

    /// The plan that takes the least time of those that fit.
    ///
    /// # Errors
    /// [`Error::BudgetTooSmall`] with what is missing, and [`Error::Configuration`] for a disk that is too
    /// small or a machine whose speed of computing is not known.
    pub fn answer(&self) -> Result<Answer> {
        let Machine { matmul_bf16_flop_per_s, attention_bf16_flop_per_s, .. } = self.machine;
        let Machine { matmul_f32_flop_per_s, attention_f32_flop_per_s, .. } = self.machine;
        let (matmul, attention, which) = match (self.machine.is_apart(), self.products) {
            (true, _) => (matmul_bf16_flop_per_s, attention_bf16_flop_per_s, "matrix products"),
            (false, Products::F32) => (matmul_f32_flop_per_s, attention_f32_flop_per_s, "matrix products"),
            // Attention stays with f32.
            (false, Products::Bf16) => (matmul_bf16_flop_per_s, attention_f32_flop_per_s, "products of bf16"),
        };
        let matmul = matmul.ok_or_else(|| {
            Error::Configuration(format!(
                "the machine's file does not say how fast {which} are: make one with ferrozero probe, on a \
                 machine that has them"
            ))
        })?;
        // On a device of its own what lies outside of a window is computed and masked.
        let spares_windows = !self.machine.is_apart();
        let speeds = Speeds { matmul, attention: attention.unwrap_or(matmul), spares_windows };
        let compute = self.shape.compute(self.batch, self.sequence, speeds);
        let plan = self.search(&compute, |search| search.best(&self.machine))?;
        let prediction = plan.prediction().cloned();
        let prediction = prediction.ok_or_else(|| internal("a plan without a prediction"))?;
        Ok(Answer {
            disk_bytes: self.disk_bytes(&plan),
            tokens_per_s: (self.tokens() * self.accumulate) as f64 / prediction.forecast.step_s,
            boundaries: plan.boundaries(),
            depths: plan.depths(),
            costed: prediction.costed,
            forecast: prediction.forecast,
            plan,
        })
    }

    /// This question for the split of a step's sequences into micro-batches that is fastest, and its answer.
    /// A larger micro-batch needs more memory for activations, which leaves less for states; more
    /// micro-batches move parameters and gradients more often.
    ///
    /// # Errors
    /// As [`Self::answer`], where no split has a plan.
    pub fn best_split(&self) -> Result<(Self, Answer)> {
        let sequences = self.batch * self.accumulate;
        let splits = (1..=sequences).filter(|batch| sequences.is_multiple_of(*batch));
        let questions = splits.map(|batch| Self { batch, accumulate: sequences / batch, ..self.clone() });
        let mut best: Option<(Self, Answer)> = None;
        let mut refusal = None;
        for question in questions {
            match question.answer() {
                Ok(answer) => {
                    if best.as_ref().is_none_or(|(_, best)| answer.tokens_per_s > best.tokens_per_s) {
                        best = Some((question, answer));
                    }
                }
                // That of the smallest micro-batch is what is least.
                Err(error) => refusal = refusal.or(Some(error)),
            }
        }
        match (best, refusal) {
            (Some(best), _) => Ok(best),
            (None, Some(refusal)) => Err(refusal),
            (None, None) => Err(Error::Configuration("a step needs at least one sequence".into())),
        }
    }

    /// Whether any plan fits.
    pub fn fits(&self) -> bool {
        let compute = Compute::none(self.shape.segments());
        self.search(&compute, |search| search.fitting(true).map(drop)).is_ok()
    }

    /// Bytes of files: with a disk all states are on it, twice unless in place, and what has its home there
    /// alone.
    fn disk_bytes(&self, plan: &Plan) -> u64 {
        if !self.has_disk() {
            return 0;
        }
        let states = Stream::STATE.into_iter().flat_map(|stream| {
            let layout = plan.layout();
            (0..layout.groups.len()).map(move |group| 4 * stream.elements(layout, group) as u64)
        });
        let copies = if self.in_place { 1 } else { 2 };
        copies * states.sum::<u64>() + plan.scratch_disk_bytes()
    }

    fn check_disk(&self, plan: &Plan) -> Result<()> {
        let needed = self.disk_bytes(plan);
        match self.machine.disk_bytes {
            Some(limit) if needed > limit => Err(Error::Configuration(format!(
                "the disk must hold {} and may hold {}: states are kept twice so that a kill loses nothing \
                 (in place they are kept once), or make the model smaller",
                Bytes(needed),
                Bytes(limit)
            ))),
            _ => Ok(()),
        }
    }

    /// The largest model of the family that has a plan, by the number of its blocks.
    pub fn largest(&self) -> Option<ModelShape> {
        let fits = |layers: usize| Self { shape: self.shape.grown(layers), ..self.clone() }.fits();
        let mut fitting = 1;
        if !fits(fitting) {
            return None;
        }
        let mut too_large = 2;
        while too_large < LAYERS_MAX && fits(too_large) {
            fitting = too_large;
            too_large *= 2;
        }
        while too_large - fitting > 1 {
            let middle = fitting.midpoint(too_large);
            match fits(middle) {
                true => fitting = middle,
                false => too_large = middle,
            }
        }
        Some(self.shape.grown(fitting))
    }

    /// What a better machine would make of it: the change, and how many times as fast, the most first.
    pub fn advice(&self, answer: &Answer) -> Vec<(String, f64)> {
        let mut changes: Vec<(String, Self)> = vec![];
        let mut add = |text: String, change: &dyn Fn(&mut Self)| {
            let mut changed = self.clone();
            change(&mut changed);
            changes.push((text, changed));
        };
        if let Some(bytes) = self.machine.host_memory_bytes {
            let more = (bytes / 4).max(64 << 20).next_power_of_two();
            add(format!("{} more host memory", Bytes(more)), &|changed| {
                changed.machine.host_memory_bytes = Some(bytes + more);
            });
        }
        if self.has_disk() {
            add("a disk twice as fast".into(), &|changed| {
                changed.machine.disk_read_bytes_per_s *= 2.0;
                changed.machine.disk_write_bytes_per_s *= 2.0;
                changed.machine.disk_mixed_bytes_per_s =
                    changed.machine.disk_mixed_bytes_per_s.map(|mixed| 2.0 * mixed);
            });
        }
        add("host memory twice as fast".into(), &|changed| changed.machine.optimizer_bytes_per_s *= 2.0);
        add("a bus twice as fast".into(), &|changed| {
            changed.machine.upload_bytes_per_s *= 2.0;
            changed.machine.download_bytes_per_s *= 2.0;
        });
        add("computing twice as fast".into(), &|changed| {
            let machine = &mut changed.machine;
            for flop_per_s in [
                &mut machine.matmul_f32_flop_per_s,
                &mut machine.matmul_bf16_flop_per_s,
                &mut machine.attention_f32_flop_per_s,
                &mut machine.attention_bf16_flop_per_s,
            ] {
                *flop_per_s = flop_per_s.map(|flop_per_s| 2.0 * flop_per_s);
            }
        });
        add(format!("a batch of {}", 2 * self.batch), &|changed| changed.batch *= 2);
        let mut faster: Vec<(String, f64)> = changes
            .into_iter()
            .filter_map(|(text, changed)| {
                // With the depths of the answer there is less to search; where they do not fit, others may.
                let with_depths =
                    Self { choices: changed.choices.with_depths(answer.depths), ..changed.clone() };
                let changed = with_depths.answer().or_else(|_| changed.answer()).ok()?;
                Some((text, changed.tokens_per_s / answer.tokens_per_s))
            })
            .collect();
        faster.sort_by(|a, b| b.1.total_cmp(&a.1));
        faster
    }
}

/// More blocks than any model has.
const LAYERS_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::buffer_plan::GroupPlacement;

    /// A share of the best that the planner's choice must reach.
    const GOOD_ENOUGH: f64 = 0.95;
    /// Pieces so small that each group has several.
    const SMALL_PIECE_ELEMENTS: usize = 8 * 1024;

    /// How many groups have each stream near, of `groups`: every combination.
    fn counts(groups: usize) -> impl Iterator<Item = [usize; 4]> {
        let each = groups + 1;
        (0..each.pow(4)).map(move |code| [1, each, each * each, each.pow(3)].map(|place| code / place % each))
    }

    /// The first groups of each count have the stream in memory, the resident group before all others.
    fn placements(groups: usize, near: [usize; 4]) -> Vec<GroupPlacement> {
        let mut placements = vec![GroupPlacement::all(Tier::Disk); groups];
        // On the CPU device the resident group's masters are there always.
        placements[groups - 1].master = Tier::Device;
        let order = std::iter::once(groups - 1).chain(0..groups - 1);
        for (place, group) in order.enumerate() {
            for (stream, _) in Stream::ALL.into_iter().zip(near).filter(|(_, near)| place < *near) {
                let tier = if stream == Stream::Master { Tier::Device } else { Tier::Host };
                placements[group].set_home(stream, tier);
            }
        }
        placements
    }

    fn depths() -> impl Iterator<Item = Depths> {
        let pools = [(4, 1), (16, 2)].into_iter();
        let each = pools.flat_map(|pools| [1, 4].map(|look_ahead| (pools, look_ahead)));
        each.flat_map(|((state_pieces, gradient_sets), look_ahead)| {
            [(1, 0), (2, 0), (1, 1), (2, 2)].map(|(slots, kept)| Depths {
                slots,
                look_ahead,
                state_pieces,
                gradient_sets,
                vertical: 1,
                kept,
            })
        })
    }

    /// All homes by stream and number of groups, slots, graphs that are kept, homes of boundaries and moments
    /// of the update, each costed in full; for three budgets, on a disk that is what a step waits for and on
    /// one that is about as busy as computing.
    #[test]
    fn the_choice_is_as_good_as_the_best_of_all_that_fit() {
        for disk_bytes_per_s in [2e8, 1e9] {
            let machine = Machine {
                processors: Some(2),
                disk_read_bytes_per_s: disk_bytes_per_s,
                disk_write_bytes_per_s: disk_bytes_per_s,
                disk_mixed_bytes_per_s: Some(1.2 * disk_bytes_per_s),
                upload_bytes_per_s: 6e9,
                download_bytes_per_s: 6e9,
                optimizer_bytes_per_s: 12e9,
                matmul_f32_flop_per_s: Some(5e10),
                ..Machine::default()
            };
            let question = Question {
                shape: ModelShape::gpt(256, 2, 64, 2, 64),
                batch: 2,
                sequence: 64,
                accumulate: 1,
                clip: true,
                in_place: false,
                ranks: 1,
                machine: machine.clone(),
                products: Products::F32,
                choices: Choices::default(),
            };
            let speeds = Speeds { matmul: 5e10, attention: 5e10, spares_windows: true };
            let compute = question.shape.compute(2, 64, speeds);
            let states = 16 * question.shape.parameters();
            for budget in 0..3 {
                compare(&question, &machine, &compute, states * budget / 3);
            }
        }
    }

    fn compare(question: &Question, machine: &Machine, compute: &Compute, beyond_the_least: u64) {
        let search = |memory_bytes: u64| {
            let layout = question.shape.layout(SMALL_PIECE_ELEMENTS, 1);
            let observed = question.boundary_homes().into_iter();
            Search {
                layout: Arc::new(layout),
                limits: Limits { memory_bytes: Some(memory_bytes), ..question.limits() },
                adamw: AdamW::default(),
                accumulate: 1,
                clip: Some(1.0),
                has_disk: true,
                ranks: 1,
                observed: observed.map(|home| (home, question.observed(home, compute))).collect(),
                check: &|_| Ok(()),
            }
        };
        let Err(Error::BudgetTooSmall { needed_bytes, .. }) = search(1).best(machine) else { unreachable!() };
        let memory_bytes = needed_bytes + beyond_the_least;
        let search = search(memory_bytes);
        let chosen = search.best(machine).unwrap();
        let chosen_s = chosen.forecast(machine, compute).step_s;
        let groups = search.layout.groups.len();
        let (mut best_s, mut tried) = (f64::INFINITY, 0);
        for (boundaries, observed) in &search.observed {
            for near in counts(groups) {
                for depths in depths() {
                    let homes = placements(groups, near);
                    let at = (*boundaries, depths);
                    let mut plan = search.plan_with(&search.layout, observed, homes, at);
                    if plan.fits() {
                        tried += 1;
                        for updates_at_once in [false, true] {
                            plan.updates_at_once = updates_at_once;
                            best_s = best_s.min(plan.forecast(machine, &observed.compute).step_s);
                        }
                    }
                }
            }
        }
        assert!(tried > 0, "nothing to compare with");
        println!("{memory_bytes} bytes: {chosen_s:.5} s, the best of {tried} is {best_s:.5} s");
        assert!(best_s / chosen_s >= GOOD_ENOUGH, "{memory_bytes} bytes: {chosen_s} against {best_s}");
    }

    #[test]
    fn a_step_is_split_into_the_micro_batches_that_are_fastest() {
        let machine = Machine {
            host_memory_bytes: Some(64 << 20),
            disk_read_bytes_per_s: 2e8,
            disk_write_bytes_per_s: 2e8,
            upload_bytes_per_s: 6e9,
            download_bytes_per_s: 6e9,
            optimizer_bytes_per_s: 12e9,
            matmul_f32_flop_per_s: Some(5e10),
            ..Machine::default()
        };
        let question = Question {
            shape: ModelShape::gpt(256, 3, 128, 2, 64),
            batch: 8,
            sequence: 64,
            accumulate: 1,
            clip: true,
            in_place: false,
            ranks: 1,
            machine,
            products: Products::F32,
            choices: Choices::default(),
        };
        let (split, answer) = question.best_split().unwrap();
        assert_eq!(split.batch * split.accumulate, 8);
        for (batch, accumulate) in [(1, 8), (2, 4), (4, 2), (8, 1)] {
            let other = Question { batch, accumulate, ..question.clone() };
            assert!(other.answer().is_ok_and(|other| other.tokens_per_s <= answer.tokens_per_s));
        }
    }
}
