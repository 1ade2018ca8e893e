package main

import (
	"testing"

	"firn.io/firn/internal/block"
)

// TestNBDTLSFlags: what does not fit together is refused, with the flag's name.
func TestNBDTLSFlags(t *testing.T) {
	for name, f := range map[string]nbdTLSFlags{
		"unknown mode":         {mode: "maybe"},
		"no certificate":       {mode: "require"},
		"no key":               {cert: "c.pem"},
		"authority without":    {ca: "ca.pem"},
		"allow without":        {allow: []string{"vm1=alice"}},
		"allow without ca":     {mode: "on", cert: "c.pem", key: "k.pem", allow: []string{"vm1=alice"}},
		"allow whom":           {mode: "on", cert: "c.pem", key: "k.pem", ca: "ca.pem", allow: []string{"vm1"}},
		"certificate missing":  {mode: "on", cert: t.TempDir() + "/c.pem", key: "k.pem"},
		"off with an authorty": {mode: "off", cert: "c.pem", key: "k.pem", ca: "ca.pem"},
	} {
		if _, err := f.access(); block.KindOf(err) != block.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	a, err := (&nbdTLSFlags{}).access()
	if err != nil || a.tls != nil || a.require || a.allow != nil {
		t.Errorf("%+v, %v", a, err)
	}
}
