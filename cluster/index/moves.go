package index

import (
	"math/bits"

	"firn.io/firn/cluster/seglog"
	"firn.io/firn/internal/block"
)

// ApplyMoves repoints those blocks whose live bit is set at From. What is not
// live there any more is garbage at To. It never changes what a view sees.
//
// Moves of a replica whose job is in flight wait for it, since a merge may be
// about to clear the bit; To counts as pointed at meanwhile. The segment of
// From must not have been recycled since its blocks were read. Moves are not
// repeated by recovery: until the checkpoint that holds one is durable, the
// block at From is not released, and afterwards nothing needs the move.
func (db *DB) ApplyMoves(moves []seglog.Move) {
	for i := range moves {
		m := &moves[i]
		r := db.replicas[m.Key]
		if r == nil {
			continue
		}
		if !r.busy {
			r.move(m)
			continue
		}
		// Only what is live now: a block that is not may be written anew before
		// the job ends, and its bit would then vouch for another extent.
		r.liveRuns(m, func(part seglog.Move) {
			r.deferred = append(r.deferred, part)
			db.live.keep(part.To.Segment, len(part.CRCs))
		})
	}
}

func (r *Replica) resumeMoves() {
	waiting := r.deferred
	r.deferred = nil
	for i := range waiting {
		m := &waiting[i]
		r.db.live.keep(m.To.Segment, -len(m.CRCs))
		r.move(m)
	}
}

// move repoints what is live at From.
func (r *Replica) move(m *seglog.Move) {
	v := r.volumes[m.Volume]
	if v == nil || v.record.Tombstone {
		return
	}
	if v.markers.hide(m.Chunk, m.Generation, m.Written, &v.retained) {
		return
	}
	r.liveRuns(m, func(part seglog.Move) {
		r.add(v, r.touch(v, part.Chunk), extent{
			written: part.Written, gen: part.Generation, segment: part.To.Segment, block: uint16(part.Block),
			at: part.To.Block, live: 1<<len(part.CRCs) - 1, count: uint8(len(part.CRCs)), flags: extentMoved,
		}, part.CRCs)
	})
}

// liveRuns cuts a move at cell borders and into runs of blocks that are live
// at From.
func (r *Replica) liveRuns(m *seglog.Move, f func(part seglog.Move)) {
	n := len(m.CRCs)
	if n == 0 || int(m.Block)+n > block.BlocksPerChunk || int(m.From.Block)+n > 1<<16 || int(m.To.Block)+n > 1<<16 {
		return
	}
	cells(uint16(m.Block), uint16(n), func(first uint16, count uint8, done uint16) {
		live := r.db.live.get(m.From.Segment, m.From.Block+done, 1<<count-1)
		for live != 0 {
			from := uint16(bits.TrailingZeros16(live))
			run := uint16(bits.TrailingZeros16(^(live >> from)))
			live &^= (1<<run - 1) << from
			part := *m
			at := done + from
			part.Block = block.Index(first + from)
			part.From.Block += at
			part.To.Block += at
			part.CRCs = m.CRCs[at : at+run]
			f(part)
		}
	})
}
