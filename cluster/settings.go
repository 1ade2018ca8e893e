package cluster

import (
	"context"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

// Settings are what can be changed of a volume.
type Settings struct {
	// SizeBytes is the new size; 0 leaves it.
	SizeBytes int64
	// Shrink allows a smaller size, which loses what lies beyond it.
	Shrink bool
	// ReadOnly, if set, is the new policy.
	ReadOnly *bool
}

// StartSettings changes settings of a volume through its owner (F8): this
// process, which attaches the volume for it if nobody has it. done is called on
// the loop when the new settings hold everywhere. Kinds: Invalid, Busy (another
// gateway has it), NotFound, ReadOnly (shrink), Unavailable, Canceled.
//
// Once groups are told, the change is finished whether or not ctx lasts.
func (c *Client) StartSettings(ctx context.Context, id block.VolumeID, want Settings, done func(meta.VolumeMeta, error)) {
	if a := c.attachments[id]; a != nil {
		a.StartSettings(ctx, want, done)
		return
	}
	c.StartAttach(ctx, id, func(a *Attachment, err error) {
		if err != nil {
			done(meta.VolumeMeta{}, err)
			return
		}
		a.StartSettings(ctx, want, func(v meta.VolumeMeta, err error) {
			a.Close(func(error) { done(v, err) })
		})
	})
}

// settingsChange is one change on its way:
//
//	grow:    spans -> fence all with the new settings -> metadata store -> geometry
//	shrink:  geometry -> wait for what is in flight beyond -> zero the rest -> fence all -> metadata store
//
// So a client never sees a size that a group refuses, nothing lands beyond the
// new end, and a later grow finds zeros there. If this process dies in between,
// the next owner adopts the settings of the group that has the newest.
type settingsChange struct {
	a    *Attachment
	ctx  context.Context
	want Settings
	vol  meta.VolumeMeta // with the new settings
	done func(meta.VolumeMeta, error)
}

// StartSettings changes settings of the attached volume. See Client.StartSettings.
func (a *Attachment) StartSettings(ctx context.Context, want Settings, done func(meta.VolumeMeta, error)) {
	s := &settingsChange{a: a, ctx: ctx, want: want, vol: a.vol, done: done}
	if err := s.check(); err != nil {
		a.client.loop.Post(func() { done(a.vol, err) })
		return
	}
	if s.vol.SizeBytes == a.vol.SizeBytes && s.vol.ReadOnly == a.vol.ReadOnly {
		a.client.loop.Post(func() { done(a.vol, nil) })
		return
	}
	a.setting = s
	switch {
	case s.vol.SizeBytes < a.vol.SizeBytes:
		s.shrink()
	case meta.SpansFor(s.vol.SizeBytes) > len(a.vol.Spans):
		s.addSpans()
	default:
		s.fence()
	}
}

// check finds the new settings, or why they cannot be.
func (s *settingsChange) check() error {
	a, want := s.a, s.want
	switch {
	case a.over != nil:
		return a.over
	case a.setting != nil:
		return block.Errorf(block.Busy, "another change of volume %q is under way", a.vol.Name)
	}
	if want.ReadOnly != nil {
		s.vol.ReadOnly = *want.ReadOnly
	}
	if want.SizeBytes == 0 {
		return nil
	}
	if err := meta.CheckSize(want.SizeBytes, a.vol.BlockSize); err != nil {
		return err
	}
	s.vol.SizeBytes = want.SizeBytes
	if want.SizeBytes >= a.vol.SizeBytes {
		return nil
	}
	switch {
	case !want.Shrink:
		return block.Errorf(block.Invalid, "volume %q has %d bytes: a smaller size loses data; say --shrink if that is meant", a.vol.Name, a.vol.SizeBytes)
	case want.SizeBytes%block.Size != 0:
		return block.Errorf(block.Invalid, "size %d: shrink to a multiple of %d", want.SizeBytes, block.Size)
	case a.vol.ReadOnly:
		return block.Errorf(block.ReadOnly, "volume %q is read-only", a.vol.Name)
	}
	return nil
}

// addSpans asks the coordinator for the groups of a larger size.
func (s *settingsChange) addSpans() {
	a := s.a
	c, spans := a.client, meta.SpansFor(s.vol.SizeBytes)
	var err error
	c.loop.Do(loop.Meta, func() { _, err = meta.WantSize(s.ctx, c.cfg.Store, a.vol.ID, s.vol.SizeBytes) }, func() {
		if err != nil {
			s.fail(err)
			return
		}
		c.AwaitVolume(s.ctx, a.vol.ID, func(v meta.VolumeMeta) bool { return len(v.Spans) >= spans }, func(v meta.VolumeMeta, err error) {
			if err != nil {
				s.fail(err)
				return
			}
			a.refreshed(v)
			s.vol.Spans, s.vol.Layout = v.Spans, v.Layout
			a.vol.Spans = v.Spans
			a.lay()
			s.fence()
		})
	})
}

// shrink stops what lies beyond the new end.
func (s *settingsChange) shrink() {
	a := s.a
	a.bound = s.vol.SizeBytes
	a.changed()
	a.draining = func() {
		if a.inFlightBeyond(a.bound) {
			return
		}
		a.draining = nil
		a.client.loop.Post(s.cut)
	}
	a.draining()
}

// inFlightBeyond tells whether an operation without a definite answer touches
// bytes at or beyond off.
func (a *Attachment) inFlightBeyond(off int64) bool {
	beyond := func(op *operation) bool {
		c := &op.req.Command
		if c.Type == wire.CmdMark {
			return block.Offset(c.ToChunk, 0) > off
		}
		return block.Offset(c.Chunk, c.Block)+int64(c.Count)*block.Size > off
	}
	for _, s := range a.streams {
		for op := s.head; op != nil; op = op.next {
			if beyond(op) {
				return true
			}
		}
		for _, op := range s.waiting {
			if beyond(op) {
				return true
			}
		}
	}
	return false
}

// cut makes all beyond the new end zero, so that a later grow shows zeros.
func (s *settingsChange) cut() {
	if s.over() {
		return
	}
	a := s.a
	from, old := s.vol.SizeBytes, a.vol.SizeBytes
	left, failed := 1, error(nil)
	part := func(err error) {
		left--
		if failed == nil {
			failed = err
		}
		switch {
		case left > 0 || s.over():
		case failed != nil:
			s.fail(failed)
		default:
			s.fence()
		}
	}
	if at := block.IndexAt(from); at > 0 {
		chunk := block.ChunkAt(from)
		end := min(block.Offset(chunk+1, 0), (old+block.Size-1)&^(block.Size-1))
		left++
		a.zero(chunk, at, int((end-from)/block.Size), old, part)
		from = block.Offset(chunk+1, 0)
	}
	if from < old {
		left++
		a.mark(block.ChunkAt(from), block.ChunkAt(old-1)+1, old, part)
	}
	part(nil)
}

// fence tells all groups. From here on the change goes on without the caller.
func (s *settingsChange) fence() {
	a := s.a
	if s.over() {
		return
	}
	// The name and the layout may have changed since the change began.
	v := a.vol
	v.SizeBytes, v.ReadOnly, v.Settings, v.WantBytes = s.vol.SizeBytes, s.vol.ReadOnly, a.vol.Settings+1, 0
	s.vol = v
	a.client.fenceAll(a.client.ctx, s.vol, a.owner, func(f fencing) {
		switch {
		case s.over():
		case f.refused:
			// The attachment is over, or takes a new epoch: then once more.
			a.refuted()
			a.client.loop.After(metaRetry, s.fence)
		case f.err != nil:
			s.fail(f.err)
		default:
			for _, st := range a.streams {
				st.raise(f.tokens[st.group.id])
			}
			s.store()
		}
	})
}

// store writes the settings, which the groups have, to the metadata store.
func (s *settingsChange) store() {
	a := s.a
	c := a.client
	if s.over() {
		return
	}
	var v meta.VolumeMeta
	var err error
	rec := wire.VolumeRecord{Size: s.vol.SizeBytes, ReadOnly: s.vol.ReadOnly, Settings: s.vol.Settings}
	nonce := a.owner.Nonce
	c.loop.Do(loop.Meta, func() { v, err = adoptSettings(c.ctx, c.cfg.Store, a.vol.ID, nonce, rec) }, func() {
		switch {
		case s.over():
		case err == nil:
			a.vol.SizeBytes, a.vol.ReadOnly, a.vol.Settings, a.vol.WantBytes = v.SizeBytes, v.ReadOnly, v.Settings, v.WantBytes
			s.end(nil)
		case block.KindOf(err) == block.Fenced:
			a.checkOwner()
			c.loop.After(metaRetry, s.store)
		default:
			c.loop.After(metaRetry, s.store)
		}
	})
}

// over tells whether the change has ended, as it does with its attachment.
func (s *settingsChange) over() bool { return s.a.setting != s }

func (s *settingsChange) fail(err error) {
	if !s.over() {
		s.end(err)
	}
}

func (s *settingsChange) end(err error) {
	a := s.a
	a.setting, a.draining = nil, nil
	a.bound = a.vol.SizeBytes
	if a.over == nil {
		a.changed()
	}
	s.done(a.vol, err)
}

// AwaitVolume calls done once cond holds of the volume, looking again every so
// often while ctx lasts. The error of a volume that waits for something names it.
func (c *Client) AwaitVolume(ctx context.Context, id block.VolumeID, cond func(meta.VolumeMeta) bool, done func(meta.VolumeMeta, error)) {
	var last meta.VolumeMeta
	var look func()
	look = func() {
		var v meta.VolumeMeta
		var err error
		c.loop.Do(loop.Meta, func() { v, err = meta.GetVolume(ctx, c.cfg.Store, id) }, func() {
			if err == nil {
				last = v
			}
			switch {
			case err == nil && cond(v):
				done(v, nil)
			case ctx.Err() != nil && last.Waiting != "":
				done(last, block.Errorf(block.Unavailable, "volume %q waits: %s", last.Name, last.Waiting))
			case ctx.Err() != nil:
				done(last, block.Errorf(block.Unavailable, "volume %s: no coordinator has served it yet; are nodes running?", id))
			case err != nil && block.KindOf(err) != block.Unavailable:
				done(last, err)
			default:
				c.loop.After(2*tickEvery, look)
			}
		})
	}
	look()
}

// DeleteInGroup makes the volume a tombstone in a group; for the coordinator. It
// calls done on the loop when apply has answered, or when ctx has ended.
func (c *Client) DeleteInGroup(ctx context.Context, v meta.VolumeMeta, g block.GroupID, done func(error)) {
	op := c.newOperation()
	op.group, op.ctx = c.groupAt(g), ctx
	op.req.Kind, op.req.Group, op.req.Layout = wire.ReqPropose, g, v.Layout
	op.req.Command = wire.Command{Type: wire.CmdDelete, Cluster: c.cfg.Cluster, Volume: v.ID, Epoch: v.Epoch, Layout: v.Layout}
	op.answered = func(res *wire.ApplyResult, err error) {
		if err == nil && res.Outcome != wire.OutcomeApplied {
			err = block.Errorf(block.Internal, "group %d refuses to delete volume %s with outcome %d", g, v.ID, res.Outcome)
		}
		done(err)
	}
	op.group.submit(op)
}
