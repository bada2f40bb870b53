//! Rules that bear some dishonest devices, over rows of values that [`merge`](fn@crate::merge) has clipped and sorted.
//!
//! All are unweighted: weights are what devices say of themselves, and a rule that bears `f` of `n` liars must not
//! let one of them count for many.

/// Coordinate-wise median (Yin et al. 2018, arXiv 1803.01498); of an even number between the middle two.
pub(crate) fn median(rows: &[Vec<f32>]) -> Vec<f32> {
    by_coordinate(rows, |sorted| {
        let upper = sorted.get(sorted.len() / 2).copied().unwrap_or_default();
        let lower = sorted.get((sorted.len() - 1) / 2).copied().unwrap_or_default();
        f32::midpoint(lower, upper)
    })
}

/// Coordinate-wise mean without the `trim` lowest and highest values (Yin et al. 2018); `2·trim < rows.len()`.
pub(crate) fn trimmed_mean(rows: &[Vec<f32>], trim: usize) -> Vec<f32> {
    by_coordinate(rows, |sorted| {
        let middle = sorted.get(trim..sorted.len() - trim).unwrap_or_default();
        let sum: f64 = middle.iter().map(|value| f64::from(*value)).sum();
        (sum / middle.len() as f64) as f32
    })
}

/// Plain mean of the rows at `places`, summed in their order.
pub(crate) fn mean(rows: &[Vec<f32>], places: &[usize]) -> Vec<f32> {
    let mut sums = vec![0.0_f64; rows.first().map_or(0, Vec::len)];
    for row in places.iter().filter_map(|place| rows.get(*place)) {
        sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value));
    }
    sums.into_iter().map(|sum| (sum / places.len() as f64) as f32).collect()
}

/// Multi-Krum (Blanchard et al. 2017, arXiv 1703.02757): places of the `n − byzantine` rows whose `n − byzantine − 2`
/// nearest others are nearest, in rising order. Of equal scores the earlier row is kept.
pub(crate) fn multi_krum(rows: &[Vec<f32>], byzantine: usize) -> Vec<usize> {
    let distances = squared_distances(rows);
    let mut scores: Vec<(f64, usize)> = Vec::with_capacity(rows.len());
    for (place, row) in distances.chunks(rows.len().max(1)).enumerate() {
        let mut others: Vec<f64> =
            row.iter().enumerate().filter(|(other, _)| *other != place).map(|(_, d)| *d).collect();
        others.sort_by(f64::total_cmp);
        let near = rows.len().saturating_sub(byzantine + 2);
        scores.push((others.iter().take(near).sum(), place));
    }
    scores.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    scores.truncate(rows.len().saturating_sub(byzantine));
    let mut kept: Vec<usize> = scores.into_iter().map(|(_, place)| place).collect();
    kept.sort_unstable();
    kept
}

/// Symmetric matrix, row-major.
fn squared_distances(rows: &[Vec<f32>]) -> Vec<f64> {
    let count = rows.len();
    let mut distances = vec![0.0; count * count];
    for (i, left) in rows.iter().enumerate() {
        for (j, right) in rows.iter().enumerate().skip(i + 1) {
            let distance = left.iter().zip(right).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
            distances[i * count + j] = distance;
            distances[j * count + i] = distance;
        }
    }
    distances
}

/// Applies `rule` to the sorted values of each coordinate.
fn by_coordinate(rows: &[Vec<f32>], rule: impl Fn(&[f32]) -> f32) -> Vec<f32> {
    let width = rows.first().map_or(0, Vec::len);
    let mut column = Vec::with_capacity(rows.len());
    let mut merged = Vec::with_capacity(width);
    for coordinate in 0..width {
        column.clear();
        column.extend(rows.iter().filter_map(|row| row.get(coordinate).copied()));
        column.sort_unstable_by(f32::total_cmp);
        merged.push(rule(&column));
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn krum_sums_the_distances_to_the_nearest_rows() {
        // 5 rows, 1 liar: the two nearest count. 11: 4 + 36, 4: 1 + 9, 9: 4 + 16, 1: 9 + 16, 5: 1 + 16.
        let rows: Vec<Vec<f32>> = [11.0, 4.0, 9.0, 1.0, 5.0].map(|value| vec![value]).into();
        assert_eq!(multi_krum(&rows, 1), [1, 2, 3, 4]);
    }

    #[test]
    fn of_equal_scores_the_earlier_row_is_kept() {
        assert_eq!(multi_krum(&vec![vec![1.0]; 7], 2), [0, 1, 2, 3, 4]);
    }
}
