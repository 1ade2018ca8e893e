package node

import (
	"cmp"
	"time"

	"firn.io/firn/cluster/index"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

const (
	// reapExtents is how many hidden extents one job of the reaper removes.
	reapExtents = 4096
	// truncateEntries is how many entries are worth a truncation without need.
	truncateEntries = 512
	// checkpointPause is the least time between checkpoints for want of space.
	checkpointPause = 5
)

// upkeep is the clock of the work in the background.
func (n *Node) upkeep() {
	if n.stopping {
		return
	}
	n.loop.After(n.cfg.Pace.Upkeep, n.upkeep)
	now := n.loop.Now()
	for _, rep := range n.sorted() {
		rep.expire(now)
	}
	n.orders.pursue()
	n.views.upkeep(now)
	for _, d := range n.disks {
		if d.failed == nil {
			d.upkeep(now)
		}
	}
}

// upkeep starts what is due on the disk: one chain of jobs at a time.
func (d *disk) upkeep(now clock.Instant) {
	d.settle()
	d.truncate(d.pressed() || d.crowded(), func(error) {})
	if d.busy {
		return
	}
	d.ticks++
	if due := d.due(now); len(due) > 0 {
		d.checkpoint(due, func(error) {})
		return
	}
	if d.needFlush {
		d.checkpoint(nil, func(error) {})
		return
	}
	d.reap()
}

// settle tells the log once that no replica reads what it recovered any more.
func (d *disk) settle() {
	if d.settled {
		return
	}
	for _, rep := range d.replicas() {
		if rep.opening || rep.group == nil && rep.halted == nil {
			return
		}
	}
	d.settled = true
	d.log.Recovered()
}

// logged is how much the log has taken since it was opened.
func (d *disk) logged() int64 { return int64(d.log.Stats().BatchBlocks) * block.Size }

// reap runs a job of the reaper for one replica, or for all when room is short.
// A flush follows: only then is what they removed free.
func (d *disk) reap() {
	reps := d.held()
	var next func()
	next = func() {
		for len(reps) > 0 {
			rep := reps[0]
			reps = reps[1:]
			if rep.state.Pending().Markers == 0 {
				continue
			}
			job := rep.state.StartReap(reapExtents)
			if job == nil {
				continue
			}
			d.busy = true
			d.run(job, func(err error) {
				d.busy = false
				d.needFlush = true
				d.node.counters.Reaped++
				if err == nil && d.crowded() {
					next()
				}
			})
			return
		}
	}
	next()
}

// crowded tells whether writers are slowed for want of room.
func (d *disk) crowded() bool { return d.taken()*100 >= d.room()*slowPercent }

// pressed tells whether the logs claim more than their cap, or free segments
// are short.
func (d *disk) pressed() bool {
	return d.needSpace || d.log.Space().ClaimedBytes > d.logCap()
}

// markerAge bounds the age of a change that is not checkpointed if there is a
// trim of whole chunks among them: their space is free only afterwards, and
// whoever trims looks for it.
const markerAge = 10 * time.Second

// due returns the replicas to checkpoint now: all that changed when memory or
// log are over their bounds, or when room is short and a marker waits for its
// checkpoint, which the reaper needs; else those whose oldest change is old.
func (d *disk) due(now clock.Instant) []*replica {
	pace := &d.node.cfg.Pace
	updates := 0
	trimmed := false
	var changed, old []*replica
	for _, rep := range d.held() {
		p := rep.state.Pending()
		updates += p.Updates
		if p.Entries == 0 && p.Updates == 0 || p.Busy {
			continue
		}
		changed = append(changed, rep)
		trimmed = trimmed || p.Markers > 0
		age := pace.CheckpointAge
		if p.Markers > 0 {
			age = min(age, markerAge)
		}
		if rep.dirty && now.Sub(rep.dirtySince) >= age {
			old = append(old, rep)
		}
	}
	if updates >= pace.CheckpointUpdates || d.logged()-d.saved >= pace.CheckpointBytes {
		d.saved = d.logged()
		return changed
	}
	if (d.pressed() || trimmed && d.crowded()) && d.ticks >= checkpointPause {
		d.ticks = 0
		d.needSpace = false
		d.saved = d.logged()
		return changed
	}
	return old
}

// checkpoint merges the replicas one after the other, flushes the store, and
// truncates the logs up to what is durable then. done is called with the first
// error, which has failed the disk.
func (d *disk) checkpoint(reps []*replica, done func(error)) {
	d.busy = true
	finish := func(err error) {
		d.busy = false
		if err == nil {
			d.truncate(true, done)
			return
		}
		done(err)
	}
	var next func(i int)
	next = func(i int) {
		if i == len(reps) {
			d.needFlush = false
			d.run(d.index.StartFlush(), func(err error) {
				if err == nil {
					d.node.counters.Flushes++
					d.log.Poke()
				}
				finish(err)
			})
			return
		}
		job := reps[i].state.StartCheckpoint()
		if job == nil {
			next(i + 1)
			return
		}
		reps[i].dirty = false
		d.run(job, func(err error) {
			if err != nil {
				finish(err)
				return
			}
			d.node.counters.Checkpoints++
			next(i + 1)
		})
	}
	next(0)
}

// run does a job of the index. An error is the disk's end (L8).
func (d *disk) run(job *index.Job, done func(error)) {
	d.loop.Do(loop.Merge, job.Run, func() {
		err := cmp.Or(d.failed, job.Finish())
		if err != nil {
			d.fail(err)
		}
		done(err)
	})
}

// truncate drops from each log what a flushed checkpoint holds and no follower
// still needs (L7); under pressure also what a follower has needed for long.
// Without need, only where it is worth a write.
func (d *disk) truncate(need bool, done func(error)) {
	waiting := 1
	var first error
	ended := func(err error) {
		first = cmp.Or(first, err)
		if waiting--; waiting == 0 {
			done(first)
		}
	}
	for _, rep := range d.replicas() {
		if rep.group == nil || rep.group.Err() != nil || rep.truncating {
			continue
		}
		from, upTo := rep.log().FirstIndex(), rep.truncatable(d.pressed() || d.crowded())
		if upTo < from || !need && upTo-from < truncateEntries {
			continue
		}
		waiting++
		rep.truncating = true
		d.node.counters.Truncations++
		rep.group.Truncate(upTo, func(err error) {
			rep.truncating = false
			ended(err)
		})
	}
	ended(nil)
}

// checkpointAll checkpoints every replica of every disk, for a stop.
func (n *Node) checkpointAll(done func(error)) {
	waiting := 1
	var first error
	ended := func(err error) {
		first = cmp.Or(first, err)
		if waiting--; waiting == 0 {
			done(first)
		}
	}
	for _, d := range n.disks {
		if d.failed == nil {
			waiting++
			d.whenIdle(func() { d.checkpoint(d.held(), ended) })
		}
	}
	ended(nil)
}

// whenIdle runs fn once no chain of jobs runs on the disk.
func (d *disk) whenIdle(fn func()) {
	if d.busy {
		d.node.loop.After(d.node.cfg.Pace.Upkeep, func() { d.whenIdle(fn) })
		return
	}
	fn()
}
