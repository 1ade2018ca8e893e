package main

import (
	"path/filepath"
	"slices"
	"testing"

	"firn.io/firn/internal/block"
	"firn.io/firn/nbd/attach"
)

// TestAttachTLSFlags: what does not fit together is refused, and the process that
// stays gets paths that hold in its own folder.
func TestAttachTLSFlags(t *testing.T) {
	for name, files := range map[string]certFiles{
		"no authority":        {cert: "c.pem", key: "k.pem"},
		"no key":              {cert: "c.pem", ca: "ca.pem"},
		"no certificate":      {key: "k.pem", ca: "ca.pem"},
		"authority missing":   {ca: t.TempDir() + "/ca.pem"},
		"certificate missing": {ca: t.TempDir() + "/ca.pem", cert: "c.pem", key: "k.pem"},
	} {
		f := attachFlags{tls: files}
		if _, err := f.config("vol"); block.KindOf(err) != block.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	f := attachFlags{}
	if cfg, err := f.config("vol"); err != nil || cfg.TLS != nil {
		t.Errorf("without TLS: %+v, %v", cfg, err)
	}
	f = attachFlags{tls: certFiles{ca: "ca.pem"}}
	if _, err := f.config("vol"); err == nil {
		t.Error("no such file, and no error")
	}
	a := &attachment{cfg: attach.Config{Export: "vol"}, flags: f}
	args := a.arguments()
	if at := slices.Index(args, "--tls-ca"); at < 0 || !filepath.IsAbs(args[at+1]) || filepath.Base(args[at+1]) != "ca.pem" {
		t.Errorf("arguments %v", args)
	}
}
