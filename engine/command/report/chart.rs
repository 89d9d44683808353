//! Lines over steps, or over the time of one. Shapes are drawn to any width, and labels are text beside them,
//! so that both suit a phone.

use super::{escaped, seconds};

/// A line has at most so many points: more than a screen shows. Each is then the mean of several steps.
const POINTS_MAX: usize = 500;
/// Size of a drawing in units of its own; the page stretches it.
const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 300.0;
/// Labels at an axis, about.
const TICKS: f64 = 4.0;

/// What lies along a drawing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Along {
    /// Numbers of steps.
    Steps,
    /// Seconds of one step.
    Seconds,
}

impl Along {
    fn label(self, at: f64) -> String {
        match self {
            Self::Steps => format!("step {at}"),
            Self::Seconds => seconds(at),
        }
    }

    /// Whether there is a label at a round number.
    fn has(self, tick: f64) -> bool {
        self == Self::Seconds || tick.fract() == 0.0
    }
}

/// Values along a drawing.
pub struct Series {
    /// What they are.
    pub name: &'static str,
    /// How they are drawn, as the page's style names it.
    pub class: &'static str,
    /// Step or second, and value.
    pub points: Vec<(f64, f64)>,
}

/// A drawing of several series. `label` writes a value at the axis; with `from_zero` the axis begins at 0.
pub fn chart(
    title: &str,
    along: Along,
    series: &[Series],
    label: impl Fn(f64) -> String,
    from_zero: bool,
) -> String {
    let all = || series.iter().flat_map(|series| &series.points);
    let (Some(first), Some(last)) = (least(all().map(|point| point.0)), most(all().map(|point| point.0)))
    else {
        return String::new();
    };
    let (low, high) = (least(all().map(|point| point.1)), most(all().map(|point| point.1)));
    let low = if from_zero { 0.0 } else { low.unwrap_or(0.0) };
    let y_ticks = ticks(low, high.unwrap_or(1.0));
    let (bottom, top) = (y_ticks[0], y_ticks[y_ticks.len() - 1]);
    let x = |step: f64| if last > first { (step - first) / (last - first) } else { 0.5 };
    let y = |value: f64| 1.0 - (value - bottom) / (top - bottom);
    let mut shapes = String::new();
    let mut y_labels = String::new();
    for &tick in &y_ticks {
        let at = HEIGHT * y(tick);
        shapes += &format!(r#"<line class="grid" x1="0" x2="{WIDTH}" y1="{at:.1}" y2="{at:.1}"/>"#);
        y_labels += &format!(r#"<span style="top:{:.1}%">{}</span>"#, 100.0 * y(tick), label(tick));
    }
    for Series { class, points, .. } in series {
        let points = thinned(points);
        let drawn = points.iter().map(|&(step, value)| (WIDTH * x(step), HEIGHT * y(value)));
        let path: Vec<String> = drawn.map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
        // A line of one point is a dot, because its ends are round.
        let path = match path.as_slice() {
            [only] => format!("{only} L{only}"),
            more => more.join(" L"),
        };
        if !path.is_empty() {
            shapes += &format!(r#"<path class="line {class}" d="M{path}"/>"#);
        }
    }
    let x_ticks = ticks(first, last).into_iter().filter(|tick| (first..=last).contains(tick));
    let x_ticks = x_ticks.filter(|&tick| along.has(tick));
    let short = |tick: f64| along.label(tick).trim_start_matches("step ").to_owned();
    let x_labels: String = x_ticks
        .map(|tick| format!(r#"<span style="left:{:.1}%">{}</span>"#, 100.0 * x(tick), short(tick)))
        .collect();
    let legend = match series {
        [_] => String::new(),
        several => {
            let item = |series: &Series| format!(r#"<li class="{}">{}</li>"#, series.class, series.name);
            format!(r#"<ul class="legend">{}</ul>"#, several.iter().map(item).collect::<String>())
        }
    };
    let described: Vec<String> = series.iter().filter_map(|series| describe(series, along, &label)).collect();
    format!(
        r#"<figure><figcaption>{title}</figcaption>{legend}
<div class="plot" role="img" aria-label="{}"><div class="y">{y_labels}</div>
<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{shapes}</svg>
<div class="x">{x_labels}</div></div></figure>
"#,
        escaped(&described.join("; "))
    )
}

/// A series in words, for those who do not see it.
fn describe(series: &Series, along: Along, label: impl Fn(f64) -> String) -> Option<String> {
    let (first, last) = (series.points.first()?, series.points.last()?);
    let (from, to) = (label(first.1), label(last.1));
    let (first, last) = (along.label(first.0), along.label(last.0));
    Some(format!("{}: {from} at {first}, {to} at {last}", series.name))
}

/// As many points as a screen shows.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let each = points.len().div_ceil(POINTS_MAX).max(1);
    let mean = |part: &[(f64, f64)]| {
        let sum = part.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / part.len() as f64, sum.1 / part.len() as f64)
    };
    points.chunks(each).map(mean).collect()
}

fn least(values: impl Iterator<Item = f64>) -> Option<f64> {
    values.min_by(f64::total_cmp)
}

fn most(values: impl Iterator<Item = f64>) -> Option<f64> {
    values.max_by(f64::total_cmp)
}

/// Round numbers, at least two, from at most `low` to at least `high`.
pub fn ticks(low: f64, high: f64) -> Vec<f64> {
    // A range of nothing has a tick above and below.
    let high = if high > low { high } else { low + low.abs().max(1e-9) };
    let rough = (high - low) / TICKS;
    let power = 10.0_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0].map(|digit| digit * power).into_iter().find(|&step| step >= rough);
    let step = step.unwrap_or(10.0 * power);
    let (from, to) = ((low / step).floor() as i64, (high / step).ceil() as i64);
    // Rounded, so that 3 × 0.1 is 0.3.
    let digits = (-step.log10().floor()).clamp(0.0, 12.0);
    let scale = 10.0_f64.powf(digits);
    (from..=to.max(from + 1)).map(|number| (number as f64 * step * scale).round() / scale).collect()
}

#[cfg(test)]
mod tests {
    use super::ticks;

    #[test]
    fn ticks_are_round_and_enclose_the_range() {
        assert_eq!(ticks(0.0, 1.0), [0.0, 0.5, 1.0]);
        assert_eq!(ticks(2.1, 5.6), [2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(ticks(0.0, 3.1e-4), [0.0, 1e-4, 2e-4, 3e-4, 4e-4]);
        assert_eq!(ticks(1.0, 100.0), [0.0, 50.0, 100.0]);
        for (low, high) in [(0.0, 0.0), (5.0, 5.0), (-1.0, 1e9), (1e-12, 2e-12)] {
            let ticks = ticks(low, high);
            assert!(ticks.len() >= 2 && ticks.len() < 12, "{ticks:?}");
            assert!(ticks[0] <= low && ticks[ticks.len() - 1] >= high, "{ticks:?}");
        }
    }
}
