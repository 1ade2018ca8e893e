package node

import (
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// owner is what a disk's log asks of its index when it collects segments.
type owner struct{ disk *disk }

// LiveBlocks implements seglog.Owner.
func (o owner) LiveBlocks(seg seglog.SegmentID) int {
	if o.disk.failed != nil {
		return 1 // nothing may be overwritten any more
	}
	return o.disk.index.LiveBlocks(seg)
}

// Live implements seglog.Owner.
func (o owner) Live(seg seglog.SegmentID, b uint16) bool { return o.disk.index.Live(seg, b) }

// Describe implements seglog.Owner.
func (o owner) Describe(key seglog.ReplicaKey, id seglog.EntryID, data []byte) (seglog.Record, bool) {
	var cmd wire.Command
	state := o.disk.index.Replica(key)
	if state == nil || wire.DecodeCommand(data, &cmd) != nil || cmd.Type != wire.CmdWrite {
		return seglog.Record{}, false
	}
	return seglog.Record{Key: key, Volume: cmd.Volume, Chunk: cmd.Chunk, Block: cmd.Block, Generation: cmd.Generation,
		Written: block.MakeVersion(state.Era(), id.Index), CRCs: cmd.CRCs}, true
}

// ApplyMoves implements seglog.Owner.
func (o owner) ApplyMoves(moves []seglog.Move) {
	o.disk.node.counters.Moved += uint64(len(moves))
	o.disk.index.ApplyMoves(moves)
	// Moves age like applies: a checkpoint lets go of what they left.
	for i := range moves {
		if rep := o.disk.node.held(moves[i].Key); rep != nil && !rep.dirty {
			rep.dirty, rep.dirtySince = true, o.disk.node.loop.Now()
		}
	}
}

// NeedSpace implements seglog.Owner.
func (o owner) NeedSpace() { o.disk.needSpace = true }

// Damaged implements seglog.Owner.
func (o owner) Damaged(r seglog.Record, at seglog.Location) {
	d := o.disk
	d.node.counters.CorruptReads++
	d.corrupt++
	d.node.logf("disk %v: blocks at %d.%d of the log (group %d, volume %v, chunk %d, block %d) fail their checksums",
		d.id, at.Segment, at.Block, r.Key.Group, r.Volume, r.Chunk, r.Block)
}
