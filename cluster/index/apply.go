package index

import (
	"bytes"

	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// FeatureLevel is the highest level that this build knows. Commands of a
// higher one halt the replica.
const FeatureLevel = 1

// Apply applies a command whose payload, if it has one, lies at loc in the log
// of this disk. It is deterministic and changes memory only (S6). index is one
// above the last applied one. cmd and its slices are not kept.
//
// An error means that this build does not understand the command, or that
// entries were skipped: the replica has to halt.
func (r *Replica) Apply(index, term uint64, cmd *wire.Command, loc seglog.Location) (wire.ApplyResult, error) {
	if err := r.follows(index); err != nil {
		return wire.ApplyResult{}, err
	}
	res := wire.ApplyResult{Version: block.MakeVersion(r.group.era, index)}
	switch cmd.Type {
	case wire.CmdWrite, wire.CmdZero, wire.CmdMark:
		res.Outcome = r.applyContent(cmd, loc, res.Version)
	case wire.CmdFence:
		r.applyFence(cmd, &res)
	case wire.CmdResize:
		r.applyResize(cmd, &res)
	case wire.CmdDelete:
		r.applyDelete(cmd, &res)
	case wire.CmdFeature:
		if cmd.Feature > FeatureLevel {
			return res, block.Errorf(block.Unsupported, "group %d was raised to feature level %d, this build knows %d: run a newer one",
				r.key.Group, cmd.Feature, FeatureLevel)
		}
		r.group.feature = max(r.group.feature, cmd.Feature)
		res.Outcome = wire.OutcomeApplied
	default:
		return res, block.Errorf(block.Unsupported, "group %d has a command of type %d at index %d, which this build does not know: run a newer one",
			r.key.Group, cmd.Type, index)
	}
	r.advance(index, term)
	return res, nil
}

// ApplyEmpty notes an entry without effect.
func (r *Replica) ApplyEmpty(index, term uint64) error {
	if err := r.follows(index); err != nil {
		return err
	}
	r.advance(index, term)
	return nil
}

// ApplyConf notes a change of members: its encoded result.
func (r *Replica) ApplyConf(index, term uint64, conf []byte) error {
	if err := r.follows(index); err != nil {
		return err
	}
	r.group.conf = bytes.Clone(conf)
	r.advance(index, term)
	return nil
}

func (r *Replica) follows(index uint64) error {
	if index != r.group.applied+1 || index > block.MaxRaftIndex {
		return block.Errorf(block.Internal, "group %d: entry %d does not follow the applied index %d", r.key.Group, index, r.group.applied)
	}
	return nil
}

func (r *Replica) advance(index, term uint64) {
	r.group.applied, r.group.term = index, term
	r.entries++
}

// applyContent judges by W3, then W5, and makes the change.
func (r *Replica) applyContent(cmd *wire.Command, loc seglog.Location, at block.Version) wire.Outcome {
	v := r.volumes[cmd.Volume]
	if v == nil || v.record.Tombstone {
		return wire.OutcomeNoVolume
	}
	if outcome, done := r.judge(v, cmd); done {
		return outcome
	}
	outcome := v.admit(cmd)
	if outcome == wire.OutcomeApplied {
		v.record.Generation = max(v.record.Generation, cmd.Generation)
		switch cmd.Type {
		case wire.CmdWrite:
			r.write(v, cmd, loc, at)
		case wire.CmdZero:
			r.zero(v, cmd, at)
		case wire.CmdMark:
			r.mark(v, cmd.Generation, span{cmd.Chunk, cmd.ToChunk, at})
		}
	}
	v.window.remember(cmd.OpSeq, outcome)
	return outcome
}

// judge raises the floor and tells the outcome if epoch, floor or window
// decide it (W3).
func (r *Replica) judge(v *volume, cmd *wire.Command) (wire.Outcome, bool) {
	if cmd.Epoch != v.record.Epoch || cmd.Nonce != v.record.Nonce {
		return wire.OutcomeOldEpoch, true
	}
	if cmd.OpSeq == 0 || cmd.OpSeq >= maxOpSeq || cmd.Floor > cmd.OpSeq {
		return wire.OutcomeInvalid, true
	}
	r.soil(v)
	v.window.raise(cmd.Floor)
	if cmd.OpSeq < v.window.floor {
		return wire.OutcomeBelowFloor, true
	}
	if cmd.OpSeq-v.window.floor >= wire.OpWindow {
		return wire.OutcomeBeyondWindow, true
	}
	return v.window.outcome(cmd.OpSeq)
}

// admit is W5, and that the command makes sense.
func (v *volume) admit(cmd *wire.Command) wire.Outcome {
	var end int64 // where the last block begins
	switch cmd.Type {
	case wire.CmdWrite, wire.CmdZero:
		if cmd.Count == 0 || cmd.Block >= block.BlocksPerChunk || int(cmd.Block)+int(cmd.Count) > block.BlocksPerChunk {
			return wire.OutcomeInvalid
		}
		if cmd.Type == wire.CmdWrite && !plainPayload(cmd) {
			return wire.OutcomeInvalid
		}
		end = block.Offset(cmd.Chunk, cmd.Block+block.Index(cmd.Count)-1)
	case wire.CmdMark:
		if cmd.Chunk >= cmd.ToChunk {
			return wire.OutcomeInvalid
		}
		end = block.Offset(cmd.ToChunk-1, 0)
	}
	switch {
	case end >= v.record.Size:
		return wire.OutcomeOutOfRange
	case cmd.Generation < v.record.Generation:
		return wire.OutcomeOldGeneration
	case cmd.Generation == block.GenerationLatest:
		return wire.OutcomeInvalid
	case v.record.ReadOnly:
		return wire.OutcomeReadOnly
	}
	return wire.OutcomeApplied
}

// plainPayload tells whether the payload is raw blocks with a CRC each. Frames
// of other codecs come with a feature level of their own.
func plainPayload(cmd *wire.Command) bool {
	return cmd.Codec == 0 && cmd.KeyID == 0 && int(cmd.Count)*block.Size <= block.MaxEntryBytes &&
		int(cmd.PayloadBytes) == int(cmd.Count)*block.Size && len(cmd.CRCs) == int(cmd.Count)
}

// cells cuts [first, first+count) at the borders that extents do not cross.
func cells(first, count uint16, f func(first uint16, count uint8, done uint16)) {
	for done := uint16(0); done < count; {
		b := first + done
		n := min(cellBlocks-b%cellBlocks, count-done)
		f(b, uint8(n), done)
		done += n
	}
}

func (r *Replica) write(v *volume, cmd *wire.Command, loc seglog.Location, at block.Version) {
	d := r.touch(v, cmd.Chunk)
	d.version = at
	v.chunks.set(cmd.Chunk, at)
	cells(uint16(cmd.Block), cmd.Count, func(first uint16, n uint8, done uint16) {
		r.add(v, d, extent{
			written: at, gen: cmd.Generation, segment: loc.Segment, block: first,
			at: loc.Block + done, live: 1<<n - 1, count: n,
		}, cmd.CRCs[done:done+uint16(n)])
	})
}

func (r *Replica) zero(v *volume, cmd *wire.Command, at block.Version) {
	d := r.touch(v, cmd.Chunk)
	d.version = at
	v.chunks.set(cmd.Chunk, at)
	cells(uint16(cmd.Block), cmd.Count, func(first uint16, n uint8, _ uint16) {
		r.add(v, d, extent{written: at, gen: cmd.Generation, block: first, live: 1<<n - 1, count: n, flags: extentZero}, nil)
	})
}

// applyFence installs an attachment (F2).
func (r *Replica) applyFence(cmd *wire.Command, res *wire.ApplyResult) {
	v := r.volumes[cmd.Volume]
	switch {
	case v == nil && !sensible(cmd):
		res.Outcome = wire.OutcomeInvalid
		return
	case v == nil:
		v = r.create(cmd.Volume)
		v.record.Epoch, v.record.Nonce = cmd.Epoch, cmd.Nonce
	case v.record.Tombstone:
		res.Outcome = wire.OutcomeNoVolume
		res.Record = v.record
		return
	case cmd.Epoch < v.record.Epoch, cmd.Epoch == v.record.Epoch && cmd.Nonce != v.record.Nonce:
		res.Outcome = wire.OutcomeOldEpoch
		res.Record = v.record
		return
	case !sensible(cmd):
		res.Outcome = wire.OutcomeInvalid
		res.Record = v.record
		return
	case cmd.Epoch > v.record.Epoch:
		v.replacedEpoch, v.replacedNonce = v.record.Epoch, v.record.Nonce
		v.record.Epoch, v.record.Nonce = cmd.Epoch, cmd.Nonce
		v.window.reset()
	}
	v.record.Generation = max(v.record.Generation, cmd.Generation)
	r.settle(v, cmd)
	r.soil(v)
	res.Outcome = wire.OutcomeApplied
	res.Record = v.record
	res.ReplacedEpoch, res.ReplacedNonce = v.replacedEpoch, v.replacedNonce
}

func sensible(cmd *wire.Command) bool {
	return cmd.Size >= 0 && cmd.Size <= block.MaxVolumeBytes && len(cmd.VolumeValue) <= wire.MaxVolumeValueBytes &&
		cmd.Generation < block.GenerationLatest
}

// settle takes size, read-only and etcd value over if the command's settings
// counter is the higher one. At an equal counter the value may be newer (its
// epoch is no setting), the size is not.
func (r *Replica) settle(v *volume, cmd *wire.Command) {
	if cmd.Settings < v.record.Settings {
		return
	}
	if cmd.Settings > v.record.Settings || v.record.Size == 0 {
		v.record.Size = cmd.Size
		v.record.Settings = cmd.Settings
		v.record.ReadOnly = cmd.Flags&wire.FlagReadOnlyVolume != 0
	}
	if len(cmd.VolumeValue) > 0 && !bytes.Equal(v.record.VolumeValue, cmd.VolumeValue) {
		v.record.VolumeValue = bytes.Clone(cmd.VolumeValue)
		v.valueDirty = true
	}
}

// applyResize sets the size. With an opSeq it is one of the attachment's
// operations; without one it is ordered by the settings counter alone.
func (r *Replica) applyResize(cmd *wire.Command, res *wire.ApplyResult) {
	v := r.volumes[cmd.Volume]
	if v == nil || v.record.Tombstone {
		res.Outcome = wire.OutcomeNoVolume
		return
	}
	if res.Outcome = r.resize(v, cmd); res.Outcome == wire.OutcomeApplied {
		r.soil(v)
	}
	res.Record = v.record
}

func (r *Replica) resize(v *volume, cmd *wire.Command) wire.Outcome {
	if cmd.OpSeq == 0 {
		if !sensible(cmd) {
			return wire.OutcomeInvalid
		}
		r.settle(v, cmd)
		return wire.OutcomeApplied
	}
	if outcome, done := r.judge(v, cmd); done {
		return outcome
	}
	outcome := wire.OutcomeInvalid
	if sensible(cmd) {
		r.settle(v, cmd)
		outcome = wire.OutcomeApplied
	}
	v.window.remember(cmd.OpSeq, outcome)
	return outcome
}

// applyDelete makes a tombstone, also of a volume that was unknown: a Fence
// that comes late must find it.
func (r *Replica) applyDelete(cmd *wire.Command, res *wire.ApplyResult) {
	v := r.volumes[cmd.Volume]
	if v == nil {
		v = r.create(cmd.Volume)
	}
	if !v.record.Tombstone {
		v.record.Tombstone = true
		v.window.reset()
		v.record.VolumeValue, v.valueDirty = nil, true
		r.mark(v, block.GenerationLatest, span{0, maxChunk, res.Version})
		r.soil(v)
	}
	res.Outcome = wire.OutcomeApplied
	res.Record = v.record
}

// maxChunk is above all chunks of all volumes.
const maxChunk = block.MaxVolumeBytes / block.ChunkBytes
