package cluster

import (
	"bytes"
	"slices"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

// refuted is called when a group has answered that another epoch, or none, is
// installed there. Content operations wait from now on. Either the metadata
// store has a newer owner, then the attachment is over; or it knows nothing of
// one (it was restored from a backup, and what was fenced there is not in it):
// then this attachment takes a new epoch, and what is pending is sent anew.
func (a *Attachment) refuted() {
	if a.over != nil {
		return
	}
	a.contested = true
	a.checkOwner()
}

// checkOwner finds out whether the volume is still this attachment's, and writes
// its owner key again if that is gone with a lease. While the store does not
// answer, it tries on; I/O goes on meanwhile (F4).
func (a *Attachment) checkOwner() {
	if a.checking {
		a.checkAgain = true
		return
	}
	if a.over != nil {
		return
	}
	c := a.client
	lease := c.lease
	if lease == 0 {
		return // granted checks every attachment
	}
	a.checking, a.checkAgain = true, false
	ctx, owner := c.ctx, a.owner
	var err error
	c.loop.Do(loop.Meta, func() {
		err = meta.ReattachOwner(ctx, c.cfg.Store, a.vol.ID, owner, lease)
		err = notTheLease(ctx, c.cfg.Store, a.vol.ID, err)
	}, func() {
		a.checking = false
		if a.over != nil || ctx.Err() != nil {
			return
		}
		switch {
		case err == nil:
			a.lease = lease
			if a.contested {
				a.retake()
				return
			}
			if a.checkAgain {
				a.checkOwner()
			}
		case block.KindOf(err) == block.Fenced, block.KindOf(err) == block.NotFound && a.contested:
			a.lost(block.Wrap(block.Fenced, err, "volume %q is not attached here any more", a.vol.Name))
		default:
			c.loop.After(metaRetry, a.checkOwner)
		}
	})
}

// retake takes a new epoch while the owner key is still this attachment's.
func (a *Attachment) retake() {
	c := a.client
	a.paused, a.checking = true, true
	ctx, seen := c.ctx, a.owner.Epoch
	var got meta.Acquired
	var err error
	c.loop.Do(loop.Meta, func() { got, err = meta.RaiseEpoch(ctx, c.cfg.Store, a.vol.ID, a.owner.Nonce, seen) }, func() {
		a.checking = false
		if a.over != nil || ctx.Err() != nil {
			return
		}
		if err != nil {
			c.log.Warn("new epoch was not given", "volume", a.vol.Name, "why", err)
			c.loop.After(metaRetry, a.checkOwner)
			return
		}
		a.refence(got)
	})
}

// refence installs the new epoch, after which what is pending is sent under it.
func (a *Attachment) refence(got meta.Acquired) {
	c := a.client
	a.checking = true
	a.owner.Epoch = got.Owner.Epoch
	a.vol.Epoch = got.Owner.Epoch
	c.fenceAll(c.ctx, a.vol, a.owner, func(f fencing) {
		a.checking = false
		switch {
		case a.over != nil:
		case f.err != nil || f.refused:
			// A later epoch than the store knew: ask again who owns the volume.
			if f.err != nil {
				c.log.Warn("fence failed", "volume", a.vol.Name, "why", f.err)
			}
			a.owner.Epoch = max(a.owner.Epoch, f.seen)
			c.loop.After(metaRetry, a.checkOwner)
		default:
			for _, s := range a.streams {
				s.withdraw()
				s.raise(f.tokens[s.group.id])
			}
			if !got.Wait {
				a.resume()
				return
			}
			// Whoever had the epoch that the groups knew may serve reads until its
			// lease has run out (F3).
			a.checking = true
			c.loop.After(meta.OwnerTTL, a.waitedOut)
		}
	})
}

// waitedOut notes that the wait is over, so that the next owner need not wait
// for the same lease, and resumes even if that could not be noted: then the next
// one waits in vain. No epoch is raised meanwhile, which would need a wait anew.
func (a *Attachment) waitedOut() {
	c := a.client
	if a.over != nil {
		return
	}
	ctx, nonce := c.ctx, a.owner.Nonce
	var err error
	c.loop.Do(loop.Meta, func() { err = meta.MarkExported(ctx, c.cfg.Store, a.vol.ID, nonce) }, func() {
		if err != nil {
			c.log.Warn("the export was not noted", "volume", a.vol.Name, "why", err)
		}
		a.checking = false
		a.resume()
	})
}

// resume sends what is pending under the epoch that was installed.
func (a *Attachment) resume() {
	if a.over != nil {
		return
	}
	a.contested, a.paused = false, false
	for _, s := range a.streams {
		s.reissue()
	}
	if a.checkAgain {
		a.checkOwner()
	}
}

// refresh reads the volume's layout again, after a node has said that it changed.
func (a *Attachment) refresh() {
	if a.refreshing || a.over != nil {
		return
	}
	a.refreshing = true
	c := a.client
	ctx := c.ctx
	var v meta.VolumeMeta
	var err error
	c.loop.Do(loop.Meta, func() { v, err = meta.GetVolume(ctx, c.cfg.Store, a.vol.ID) }, func() {
		a.refreshing = false
		if err == nil && a.over == nil {
			a.refreshed(v)
		}
	})
}

// refreshed takes over what the attachment does not decide itself: the name and
// the layout.
func (a *Attachment) refreshed(v meta.VolumeMeta) {
	if v.Layout > a.vol.Layout {
		a.vol.Layout = v.Layout
		if len(v.Spans) >= len(a.vol.Spans) {
			a.vol.Spans = v.Spans
			a.lay()
		}
	}
	a.vol.WantBytes = v.WantBytes
	if v.Name != a.vol.Name && v.State == meta.Ready {
		a.vol.Name = v.Name
		a.changed()
	}
}

// ownerChanged follows the owner keys: of the volumes that are attached here,
// and those that hang on this process's lease.
func (c *Client) ownerChanged(kv meta.KV) {
	id, err := meta.ParseVolumeKey(kv.Key)
	if err != nil {
		return
	}
	o, err := meta.DecodeOwner(kv)
	known := kv.Exists() && err == nil
	if known && kv.Lease != 0 && kv.Lease == c.session.Lease() && o.Gateway == c.cfg.Gateway.ID {
		c.ownKeys[id] = o.Nonce
	} else {
		delete(c.ownKeys, id)
	}
	if a := c.attachments[id]; a != nil && (!known || o.Nonce != a.owner.Nonce) {
		a.checkOwner()
	}
}

// releaseStale removes owner keys that this process keeps alive by its lease
// without having the volume: a metadata store restored from a backup brings back
// the key of an attachment that has ended since, and nobody else may remove it
// (F6). The mirror may be behind, so the key goes by its nonce, which no
// attachment to come will have.
func (c *Client) releaseStale() {
	var stale []block.VolumeID
	for id, nonce := range c.ownKeys {
		a, t := c.attachments[id], c.attaching[id]
		if (a == nil || a.owner.Nonce != nonce) && (t == nil || t.nonce != nonce) {
			stale = append(stale, id)
		}
	}
	if len(stale) == 0 || c.releasing || c.ctx.Err() != nil {
		return
	}
	id := slices.MinFunc(stale, func(a, b block.VolumeID) int { return bytes.Compare(a[:], b[:]) })
	nonce := c.ownKeys[id]
	c.releasing = true
	c.releaseOwner(id, nonce, 0, func(err error) {
		c.releasing = false
		if err != nil {
			c.loop.After(metaRetry, c.releaseStale)
			return
		}
		if c.ownKeys[id] == nonce {
			delete(c.ownKeys, id)
		}
		c.releaseStale()
	})
}
