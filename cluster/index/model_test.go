package index_test

import (
	"fmt"
	"maps"
	"slices"

	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// model is what the replicated state means, the slow way: it keeps everything
// that was ever written and finds the newest by looking at all of it.
type model struct {
	applied uint64
	volumes map[block.VolumeID]*modelVolume
}

type modelVolume struct {
	record   wire.VolumeRecord
	replaced [2]uint64
	floor    block.OpSeq
	outcomes map[block.OpSeq]wire.Outcome
	writes   []modelWrite
}

// modelWrite is one command's effect on a run of blocks, counted from the
// start of the volume.
type modelWrite struct {
	from, to int64
	gen      block.Generation
	written  block.Version
	crcs     []uint32 // nil for zeros
	marker   bool
}

func newModel(applied uint64) *model {
	return &model{applied: applied, volumes: map[block.VolumeID]*modelVolume{}}
}

func (m *model) clone() *model {
	c := newModel(m.applied)
	for id, v := range m.volumes {
		w := *v
		w.outcomes = maps.Clone(v.outcomes)
		w.writes = slices.Clone(v.writes)
		c.volumes[id] = &w
	}
	return c
}

func (m *model) apply(cmd *wire.Command) wire.Outcome {
	m.applied++
	v := m.volumes[cmd.Volume]
	switch cmd.Type {
	case wire.CmdFence:
		return m.fence(v, cmd)
	case wire.CmdDelete:
		if v == nil {
			v = &modelVolume{}
			m.volumes[cmd.Volume] = v
		}
		v.record.Tombstone = true
		v.writes = nil
		return wire.OutcomeApplied
	case wire.CmdResize:
		if v == nil || v.record.Tombstone {
			return wire.OutcomeNoVolume
		}
		v.settle(cmd)
		return wire.OutcomeApplied
	}
	if v == nil || v.record.Tombstone {
		return wire.OutcomeNoVolume
	}
	return v.content(cmd, block.MakeVersion(0, m.applied))
}

func (m *model) fence(v *modelVolume, cmd *wire.Command) wire.Outcome {
	if v == nil {
		v = &modelVolume{floor: 1, outcomes: map[block.OpSeq]wire.Outcome{}}
		v.record.Epoch, v.record.Nonce = cmd.Epoch, cmd.Nonce
		m.volumes[cmd.Volume] = v
	}
	r := &v.record
	switch {
	case r.Tombstone:
		return wire.OutcomeNoVolume
	case cmd.Epoch < r.Epoch || cmd.Epoch == r.Epoch && cmd.Nonce != r.Nonce:
		return wire.OutcomeOldEpoch
	case cmd.Epoch > r.Epoch:
		v.replaced = [2]uint64{uint64(r.Epoch), uint64(r.Nonce)}
		r.Epoch, r.Nonce = cmd.Epoch, cmd.Nonce
		v.floor, v.outcomes = 1, map[block.OpSeq]wire.Outcome{}
	}
	r.Generation = max(r.Generation, cmd.Generation)
	v.settle(cmd)
	return wire.OutcomeApplied
}

func (v *modelVolume) settle(cmd *wire.Command) {
	if r := &v.record; cmd.Settings > r.Settings || cmd.Settings == r.Settings && r.Size == 0 {
		r.Size, r.Settings = cmd.Size, cmd.Settings
		r.ReadOnly = cmd.Flags&wire.FlagReadOnlyVolume != 0
	}
}

func (v *modelVolume) content(cmd *wire.Command, at block.Version) wire.Outcome {
	if cmd.Epoch != v.record.Epoch || cmd.Nonce != v.record.Nonce {
		return wire.OutcomeOldEpoch
	}
	if cmd.OpSeq == 0 || cmd.Floor > cmd.OpSeq {
		return wire.OutcomeInvalid
	}
	v.floor = max(v.floor, cmd.Floor)
	if cmd.OpSeq < v.floor {
		return wire.OutcomeBelowFloor
	}
	if cmd.OpSeq >= v.floor+4096 {
		return wire.OutcomeBeyondWindow
	}
	if o, ok := v.outcomes[cmd.OpSeq]; ok {
		return o
	}
	o := v.change(cmd, at)
	v.outcomes[cmd.OpSeq] = o
	return o
}

func (v *modelVolume) change(cmd *wire.Command, at block.Version) wire.Outcome {
	w := modelWrite{gen: cmd.Generation, written: at, marker: cmd.Type == wire.CmdMark}
	w.from = int64(cmd.Chunk)*block.BlocksPerChunk + int64(cmd.Block)
	w.to = w.from + int64(cmd.Count)
	last := w.to - 1
	switch cmd.Type {
	case wire.CmdMark:
		w.from, w.to = int64(cmd.Chunk)*block.BlocksPerChunk, int64(cmd.ToChunk)*block.BlocksPerChunk
		last = w.to - block.BlocksPerChunk
	case wire.CmdWrite:
		w.crcs = cmd.CRCs
	}
	switch {
	case last*block.Size >= v.record.Size:
		return wire.OutcomeOutOfRange
	case cmd.Generation < v.record.Generation:
		return wire.OutcomeOldGeneration
	case v.record.ReadOnly:
		return wire.OutcomeReadOnly
	}
	v.record.Generation = cmd.Generation
	v.writes = append(v.writes, w)
	return wire.OutcomeApplied
}

// seen is what a view of generation g finds at a block: nil for a hole or zeros.
func (m *model) seen(id block.VolumeID, b int64, g block.Generation) *seenBlock {
	v := m.volumes[id]
	if v == nil {
		return nil
	}
	var best *modelWrite
	for i := range v.writes {
		w := &v.writes[i]
		if w.from <= b && b < w.to && w.gen <= g && (best == nil || w.gen > best.gen || w.gen == best.gen && w.written > best.written) {
			best = w
		}
	}
	if best == nil || best.crcs == nil {
		return nil
	}
	return &seenBlock{best.gen, best.written, best.crcs[b-best.from]}
}

type seenBlock struct {
	gen     block.Generation
	written block.Version
	crc     uint32
}

func (s *seenBlock) String() string {
	if s == nil {
		return "nothing"
	}
	return fmt.Sprintf("generation %d, written %v, CRC %x", s.gen, s.written, s.crc)
}

// lastChange is the version that a chunk has at least (S4).
func (m *model) lastChange(id block.VolumeID, c block.Chunk) block.Version {
	var last block.Version
	from := int64(c) * block.BlocksPerChunk
	for _, w := range m.volumes[id].writes {
		if w.from < from+block.BlocksPerChunk && w.to > from {
			last = max(last, w.written)
		}
	}
	return last
}
