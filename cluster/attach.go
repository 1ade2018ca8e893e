package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

// ownerPatience is how long an attach waits for the key of another owner to
// vanish: that of a dead one does within its lease.
const ownerPatience = meta.OwnerTTL + time.Second

// fencePatience is how long an attach waits for groups to commit its Fence: for
// more than an election, and less than a client waits for an answer.
const fencePatience = 8 * time.Second

// errSilent ends the Fences of an attach.
var errSilent = errors.New("the Fence was not committed in time")

// StartAttach attaches a volume (F1) and calls done, on the loop, once it is
// fenced everywhere and may be exported, or cannot be. Kinds: NotFound, Busy
// (another gateway has it; the text names it), Unavailable (the text names groups
// without a majority), Canceled.
func (c *Client) StartAttach(ctx context.Context, id block.VolumeID, done func(*Attachment, error)) {
	t := &attaching{client: c, ctx: ctx, id: id, done: done, began: c.loop.Now()}
	if c.session == nil {
		err := block.Errorf(block.Unsupported, "this process is no gateway")
		c.loop.Post(func() { done(nil, err) })
		return
	}
	c.loop.Post(t.acquire)
}

// attaching is the way from a volume's id to an Attachment:
//
//	acquire the owner key -> fence every group -> raise etcd to what won -> wait -> export
//
// A refused Fence, or settings in a group that the metadata store does not have,
// go back one step.
type attaching struct {
	client *Client
	ctx    context.Context
	id     block.VolumeID
	done   func(*Attachment, error)
	began  clock.Instant

	nonce  block.Nonce
	lease  meta.LeaseID
	got    meta.Acquired
	fenced clock.Instant // when the last Fence was answered
	tokens map[block.GroupID]block.Version
	waited bool
}

// acquire takes the owner key. While another has it, or there is no lease, it
// tries again.
func (t *attaching) acquire() {
	c := t.client
	if t.givenUp("attach") {
		return
	}
	// The owner key of this process is not to be replaced by this process.
	if other := c.attaching[t.id]; c.attachments[t.id] != nil || other != nil && other != t {
		if c.loop.Now().Sub(t.began) > ownerPatience {
			t.end(nil, block.Errorf(block.Busy, "volume %s is attached here already", t.id))
			return
		}
		c.loop.After(tickEvery, t.acquire)
		return
	}
	c.attaching[t.id] = t
	lease := c.leased()
	if lease == 0 {
		if c.loop.Now().Sub(t.began) > ownerPatience {
			t.end(nil, block.Errorf(block.Unavailable, "this gateway has no lease: the metadata store does not answer"))
			return
		}
		c.loop.After(tickEvery, t.acquire)
		return
	}
	if t.nonce == 0 || t.lease != lease {
		t.nonce, t.lease = c.drawNonce(), lease
	}
	g := c.cfg.Gateway
	o := meta.OwnerMeta{Gateway: g.ID, Nonce: t.nonce, Addr: c.cfg.OwnerAddr, Boot: g.Boot, Folder: g.Folder}
	var got meta.Acquired
	var err error
	c.loop.Do(loop.Meta, func() {
		got, err = meta.AcquireOwner(t.ctx, c.cfg.Store, t.id, o, lease)
		err = notTheLease(t.ctx, c.cfg.Store, t.id, err)
	}, func() {
		switch {
		case err == nil:
			t.got = got
			t.fence()
		case block.KindOf(err) == block.Busy && c.loop.Now().Sub(t.began) < ownerPatience,
			block.KindOf(err) == block.Unavailable && t.ctx.Err() == nil && c.loop.Now().Sub(t.began) < ownerPatience:
			c.loop.After(metaRetry, t.acquire)
		default:
			t.end(nil, err)
		}
	})
}

// notTheLease tells a lost lease, which the store also reports as NotFound, from
// a lost volume: after the former, a new lease comes and another try helps.
func notTheLease(ctx context.Context, s meta.Store, id block.VolumeID, err error) error {
	if err == nil || block.KindOf(err) != block.NotFound {
		return err
	}
	if v, e := meta.GetVolume(ctx, s, id); e == nil && v.State != meta.Deleting || e != nil && block.KindOf(e) != block.NotFound {
		return block.Wrap(block.Unavailable, err, "the gateway's lease has ended")
	}
	return err
}

func (c *Client) drawNonce() block.Nonce {
	for {
		if n := block.Nonce(c.loop.Rand().Uint64()); n != 0 {
			return n
		}
	}
}

// fence installs the epoch in every group.
func (t *attaching) fence() {
	ctx, giveUp := context.WithCancelCause(t.ctx)
	patience := t.client.loop.After(fencePatience, func() { giveUp(errSilent) })
	t.client.fenceAll(ctx, t.got.Volume, t.got.Owner, func(f fencing) {
		patience.Stop()
		giveUp(nil)
		t.fenced, t.tokens = t.client.loop.Now(), f.tokens
		switch {
		case len(f.silent) > 0:
			t.end(nil, t.noMajority(f))
		case f.err != nil:
			t.end(nil, f.err)
		case f.refused:
			t.raise(f.seen)
		case f.newest.Settings > t.got.Volume.Settings:
			t.adopt(f.newest)
		default:
			t.wait()
		}
	})
}

// noMajority is the error of an attach whose time was over before these groups
// committed the Fence.
func (t *attaching) noMajority(f fencing) error {
	slices.Sort(f.silent)
	names := ""
	for i, g := range f.silent {
		if i == maxNamedGroups {
			names += fmt.Sprintf(" and %d more", len(f.silent)-i)
			break
		}
		names += fmt.Sprintf(" %d", g)
	}
	return block.Errorf(block.Unavailable,
		"volume %q: %d of its %d groups have no majority, or their leaders cannot be reached (%s): bring back the nodes that are down; `firn health` says which",
		t.got.Volume.Name, len(f.silent), len(t.got.Volume.Groups()), names[1:])
}

// maxNamedGroups bounds the groups that an error names.
const maxNamedGroups = 8

// raise takes an epoch above what a group has seen: the metadata store is behind.
func (t *attaching) raise(seen block.Epoch) {
	if t.givenUp("attach") {
		return
	}
	t.meta("raise the epoch", func() (err error) {
		t.got, err = meta.RaiseEpoch(t.ctx, t.client.cfg.Store, t.id, t.nonce, max(seen, t.got.Owner.Epoch))
		return err
	}, t.fence)
}

// adopt brings size and policy, which a group has from an owner that did not
// live to write them to the metadata store, there (S8), and to the other groups.
func (t *attaching) adopt(newest wire.VolumeRecord) {
	t.meta("adopt newer settings", func() error {
		v, err := adoptSettings(t.ctx, t.client.cfg.Store, t.id, t.nonce, newest)
		if err == nil {
			t.got.Volume = v
		}
		return err
	}, t.fence)
}

func adoptSettings(ctx context.Context, s meta.Store, id block.VolumeID, nonce block.Nonce, rec wire.VolumeRecord) (meta.VolumeMeta, error) {
	return meta.UpdateVolume(ctx, s, id, nonce, func(v *meta.VolumeMeta) error {
		if rec.Settings > v.Settings {
			v.SizeBytes, v.ReadOnly, v.Settings = rec.Size, rec.ReadOnly, rec.Settings
		}
		return nil
	})
}

// wait lets the lease of an owner that was removed by force run out (F3).
func (t *attaching) wait() {
	c := t.client
	switch rest := t.fenced.Add(meta.OwnerTTL).Sub(c.loop.Now()); {
	case !t.got.Wait || t.waited:
		t.export()
	case rest > 0:
		c.loop.After(rest, t.wait)
	default:
		t.waited = true
		t.meta("note the export", func() error { return meta.MarkExported(t.ctx, c.cfg.Store, t.id, t.nonce) }, t.wait)
	}
}

func (t *attaching) export() {
	c := t.client
	if t.givenUp("attach") {
		return
	}
	if c.leased() != t.lease {
		// The owner key may be gone with its lease: begin anew.
		t.waited = false
		t.acquire()
		return
	}
	a := newAttachment(c, t.got.Volume, t.got.Owner, t.lease)
	for _, s := range a.streams {
		s.raise(t.tokens[s.group.id])
	}
	c.attachments[t.id] = a
	c.attached = append(c.attached, a)
	t.end(a, nil)
}

// meta runs a metadata call until it answers; an error other than Unavailable
// ends the attempt.
func (t *attaching) meta(what string, call func() error, next func()) {
	c := t.client
	var err error
	c.loop.Do(loop.Meta, func() { err = call() }, func() {
		switch {
		case err == nil:
			next()
		case block.KindOf(err) == block.Unavailable && t.ctx.Err() == nil:
			c.loop.After(metaRetry, func() { t.meta(what, call, next) })
		default:
			t.end(nil, err)
		}
	})
}

func (t *attaching) givenUp(what string) bool {
	if err := t.ctx.Err(); err != nil {
		t.end(nil, block.Wrap(block.Canceled, context.Cause(t.ctx), "%s volume %s", what, t.id))
		return true
	}
	if t.client.ctx.Err() != nil {
		t.end(nil, block.Errorf(block.Canceled, "%s volume %s: this gateway is stopping", what, t.id))
		return true
	}
	return false
}

func (t *attaching) end(a *Attachment, err error) {
	if t.client.attaching[t.id] == t {
		delete(t.client.attaching, t.id)
	}
	if err != nil && t.nonce != 0 {
		t.client.releaseOwner(t.id, t.nonce, 0, func(error) {})
	}
	t.done(a, err)
}

// fencing is what the Fences of one epoch brought.
type fencing struct {
	tokens  map[block.GroupID]block.Version
	refused bool              // some group knows a higher epoch, or another nonce
	seen    block.Epoch       // the highest that a group knows
	newest  wire.VolumeRecord // of the highest settings counter
	silent  []block.GroupID   // that did not answer while the caller waited
	err     error
}

// fenceAll commits a Fence in every group of v and tells what they answered.
// Fences are idempotent, so they are repeated as long as ctx lasts.
func (c *Client) fenceAll(ctx context.Context, v meta.VolumeMeta, o meta.OwnerMeta, done func(fencing)) {
	f := fencing{tokens: map[block.GroupID]block.Version{}}
	value := meta.EncodeVolume(v)
	groups := v.Groups()
	left := len(groups)
	for _, id := range groups {
		op := c.newOperation()
		op.group, op.ctx = c.groupAt(id), ctx
		op.req.Kind, op.req.Group, op.req.Layout = wire.ReqPropose, id, v.Layout
		op.req.Command = wire.Command{Type: wire.CmdFence, Cluster: c.cfg.Cluster, Volume: v.ID, Epoch: o.Epoch, Nonce: o.Nonce,
			Generation: v.Generation, Layout: v.Layout, Size: v.SizeBytes, Settings: v.Settings, VolumeValue: value}
		if v.ReadOnly {
			op.req.Command.Flags |= wire.FlagReadOnlyVolume
		}
		op.answered = func(res *wire.ApplyResult, err error) {
			left--
			f.take(v, id, res, err)
			if left == 0 {
				done(f)
			}
		}
		op.group.submit(op)
	}
}

func (f *fencing) take(v meta.VolumeMeta, g block.GroupID, res *wire.ApplyResult, err error) {
	switch {
	case errors.Is(err, errSilent):
		f.silent = append(f.silent, g)
		f.err = err
	case err != nil:
		f.err = err
	case res.Outcome == wire.OutcomeApplied:
		f.tokens[g] = res.Version
		if res.Record.Settings >= f.newest.Settings {
			f.newest = res.Record
		}
	case res.Outcome == wire.OutcomeOldEpoch:
		f.refused = true
		f.seen = max(f.seen, res.Record.Epoch)
	case res.Outcome == wire.OutcomeNoVolume:
		f.err = block.Errorf(block.NotFound, "volume %q was deleted", v.Name)
	default:
		f.err = block.Errorf(block.Internal, "group %d refuses to attach volume %q with outcome %d", g, v.Name, res.Outcome)
	}
}
